"""Collection: one pass over a text that keeps sums, never decisions of single tokens.

Everything is summed on the devices, batch by batch. Small sums go to the host with each
batch, in float64 and int64; tables by vocabulary id stay on the devices until the end.
Nothing of size [tokens, E] outlives its batch. Except for the rounding of floats, no sum
depends on how a text is cut into batches or spread over devices.

The model runs dropless (unless its router needs slots), so that the sums show what the
router requests. Drops are those of the training capacity, computed from the logits.

Letters: L MoE layers, B batch, S sequence, E experts, K choices per token, R domains, M
rows for vocabulary ids, Q frequency classes, W bins.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moejax.analysis import decide, sides, streaks
from moejax.analysis.sides import ENCODER, Routing, Side
from moejax.analysis.sums import add
from moejax.errors import UserError
from moejax.evaluate import groups, perplexity
from moejax.launch import hang
from moejax.layers.routes import Routes
from moejax.models.decoder import Decoder
from moejax.models.loss import token_losses
from moejax.models.placement import param_shardings
from moejax.routing.scores import entropy
from moejax.sharding import rules
from moejax.types import Params

MAX_ROWS = 4096
"""Maximum vocabulary ids that are counted one by one; rarer ones share a last row."""

NUM_CLASSES = 5
"""Q: classes of ids by frequency, each with about the same number of tokens."""

NUM_BINS = 40
"""W: bins of entropy and of margin, over their whole ranges."""

PLACE_BINS = 16
"""Equal parts of a routing group, in the order of its tokens."""

POSITION_BINS = 16
"""Positions in a document by powers of two: 0, 1-2, 3-6, 7-14, ..."""

TABLES = ("input", "target", "predicted")
"""Ids by which experts are counted: the id read, its target, and the id predicted."""

_FLUSH = 1 << 30
"""Tokens after which int32 tables are added to the host's."""

Arrays = dict[str, Any]
"""Sums by name, as arrays on the devices or on the host."""

Visit = Callable[[Routes, Array | None, Any], None]
"""Called with (routes, kept, batch): `kept` [L, B, S, K] marks the choices that the
training capacity keeps; None for a router whose tokens do not choose."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """The row in which each vocabulary id is counted."""

  row: Int[np.ndarray, "V"]
  """0 is the most frequent id; all ids without their own row share the last one."""
  ids: Int[np.ndarray, "M"]
  """The id of each row, except the last."""
  frequency_class: Int[np.ndarray, "V"]
  """Class of each id; 0 is that of the most frequent ids."""

  @property
  def num_rows(self) -> int:
    return len(self.ids) + 1


def every_id(size: int) -> Vocabulary:
  """Returns a row for each of `size` ids; the last row stays empty."""
  ids = np.arange(size, dtype=np.int32)
  return Vocabulary(row=ids, ids=ids, frequency_class=np.zeros(size, np.int32))


def vocabulary(counts: Int[np.ndarray, "V"]) -> Vocabulary:
  """Returns rows and classes from how often each id occurs in a text."""
  order = np.argsort(-counts, kind="stable")
  ids = order[: min(MAX_ROWS, int(np.count_nonzero(counts)))]
  row = np.full(len(counts), len(ids), np.int32)
  row[ids] = np.arange(len(ids))
  before = np.cumsum(counts[order]) - counts[order]
  share = before / max(int(counts.sum()), 1)
  of_class = np.empty(len(counts), np.int32)
  of_class[order] = np.minimum((share * NUM_CLASSES).astype(np.int32), NUM_CLASSES - 1)
  return Vocabulary(row=row, ids=ids, frequency_class=of_class)


def collect(
  model: Decoder,
  params: Params,
  dataset: Any,
  *,
  split: str,
  mesh: Mesh,
  batch_size: int,
  words: Vocabulary,
  limit: int = 0,
  tables: Sequence[str] = TABLES,
  side: Side | None = None,
  progress: Callable[[int], None] | None = None,
  visit: Visit | None = None,
) -> Arrays:
  """Runs the model over a split and returns sums, in float64 and int64.

  Args:
    model: from `groups.make_model`, with at least one MoE layer.
    params: its parameters, on any devices; they are moved to the mesh.
    dataset: from `moejax.data.load`.
    split: train, validation or test.
    mesh: of the evaluation.
    batch_size: sequences per step: whole groups, from `groups.batch_size`.
    words: from `vocabulary`.
    limit: maximum number of batches; 0 means all.
    tables: by which ids experts are counted, some of `TABLES`.
    side: the stack of an encoder-decoder to be analysed; None for a decoder.
    progress: called with the number of tokens seen so far.
    visit: called with each batch, still on the devices.

  Raises:
    UserError: the split has no text.
  """
  num_domains = max(len(dataset.domains), 1)
  step = make_step(
    model, mesh, num_domains, words, side=side, with_routes=visit is not None
  )
  if side is not None and side.name == ENCODER:
    tables = [name for name in tables if name == "input"]
  shapes = table_shapes(side or model, words, tables)
  params = jax.device_put(params, param_shardings(model, mesh))
  empty = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
  held = jax.device_put(empty, rules.replicated(mesh))
  total: Arrays = {}
  kept = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}
  pending, since = None, 0
  batches = perplexity.device_batches(
    dataset, split, mesh=mesh, batch_size=batch_size, limit=limit
  )
  with jax.set_mesh(mesh):
    for batch in batches:
      held, sums, seen = step(params, held, batch)
      if visit is not None:
        assert seen is not None
        routes, by_training = seen
        visit(routes, by_training, batch)
      _add(total, pending)  # While the devices compute this batch.
      pending = sums
      since += batch["inputs"].size
      if since > _FLUSH:
        _flush(kept, held)
        held, since = jax.device_put(empty, rules.replicated(mesh)), 0
      if progress is not None and "tokens" in total:
        progress(int(total["tokens"]))
  _add(total, pending)
  _flush(kept, held)
  if not total or not total["tokens"]:
    raise UserError(f"--split={split} has no text in this dataset. Choose another split.")
  return total | kept


def table_shapes(
  model: Routing, words: Vocabulary, tables: Sequence[str] = TABLES
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the tables by id that a step adds to: assignments and tokens.

  Args:
    model: with at least one MoE layer.
    words: their rows.
    tables: some of `TABLES`.

  Returns:
    `by_NAME`, [L, E, M], and `seen_NAME`, [M].
  """
  whole = (len(model.moe_layers), model.moe.fine_experts, words.num_rows)
  by = {f"by_{name}": whole for name in tables}
  return by | {f"seen_{name}": whole[-1:] for name in tables}


def _add(total: Arrays, sums: Any) -> None:
  if sums is not None:
    add(total, sums, counts=_COUNTS)
    hang.progress()


def _flush(kept: dict[str, np.ndarray], tables: Arrays) -> None:
  for name, table in jax.device_get(tables).items():
    kept[name] += table


_COUNTS = ("pairs", "flow")
"""Counts computed by matrix products in float32: exact below 2^24 tokens per batch."""


def make_step(
  model: Decoder,
  mesh: Mesh,
  num_domains: int,
  words: Vocabulary,
  *,
  side: Side | None = None,
  with_routes: bool = False,
) -> Callable[..., tuple[Arrays, Arrays, tuple[Routes, Array | None] | None]]:
  """Returns a jitted (params, tables, batch) -> (tables, sums, arguments of a visit)."""
  own: Routing = side or model
  moe, factor = own.moe, groups.least_factor(model)
  can_replay = decide.undecidable(own) is None
  row, of_class = jnp.asarray(words.row), jnp.asarray(words.frequency_class)

  def step(params: Params, tables: Arrays, batch: Any) -> Any:
    losses, out = token_losses(
      model, params, batch, capacity_factor=factor, return_routes=True
    )
    routes, batch = sides.routes_of(side, out), sides.rows_of(side, batch)
    valid, ids = batch["segment_ids"] > 0, {"input": batch["inputs"]}
    if "targets" in batch:
      ids["target"] = batch["targets"]
      ids["predicted"] = _argmax(out.logits[..., : model.vocab_size])
    served = _by_token(routes.served)
    counted, added = valid.astype(jnp.int32).reshape(-1), {}
    for name, of in ids.items():
      if f"by_{name}" in tables:
        place = row[of]
        added[f"by_{name}"] = _by_row(served, place, words.num_rows)
        tokens = jax.ops.segment_sum(counted, place.reshape(-1), words.num_rows)
        added[f"seen_{name}"] = tokens
    tables = {name: tables[name] + more for name, more in added.items()}
    where = {
      "domain": (batch["domain"], num_domains),
      "class": (of_class[batch["inputs"]], NUM_CLASSES),
      "place": (_place(valid.shape, moe.group_size or valid.shape[1]), PLACE_BINS),
      "position": (_log_bin(batch["positions"]), POSITION_BINS),
    }
    sums = _sums(routes, valid, losses if "targets" in batch else None)
    sums["by_domain"] = _by_row(served, *where["domain"])
    trained = routes
    if can_replay and moe.capacity_factor is not None:
      below = sides.params_of(side, params)
      recorded = decide.recorded(own, below, routes, batch)
      routers = decide.router_params(own, below)
      trained = decide.decide(moe, recorded, routers, moe.capacity_factor)
    sums |= _drops(trained, valid, where)
    sums |= streaks.sums(routes.served, valid)
    return tables, sums, ((routes, trained.kept) if with_routes else None)

  shardings = (
    param_shardings(model, mesh),
    rules.replicated(mesh),
    rules.batch_sharding(mesh),
  )
  whole = rules.replicated(mesh)
  return jax.jit(
    step, in_shardings=shardings, out_shardings=(whole, whole, None), donate_argnums=1
  )


def _argmax(logits: Float[Array, "B S V"]) -> Int[Array, "B S"]:
  """Returns the first largest index: several times faster on CPU than XLA's argmax."""
  index = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None]
  top = jnp.max(logits, axis=-1, keepdims=True)
  best = jnp.min(jnp.where(logits == top, index, logits.shape[-1]), axis=-1)
  return jnp.minimum(best, logits.shape[-1] - 1)  # If the logits are NaN.


def _by_token(values: Bool[Array, "L B S E"]) -> Int[Array, "tokens L E"]:
  """Returns one row per token of the batch."""
  rows = jnp.moveaxis(values, 0, 2).reshape(-1, values.shape[0], values.shape[-1])
  return rows.astype(jnp.int32)


def _by_row(
  values: Int[Array, "tokens L E"], row: Int[Array, "B S"], num_rows: int
) -> Int[Array, "L E M"]:
  """Sums over the tokens of each row; padding is never served."""
  return jnp.moveaxis(jax.ops.segment_sum(values, row.reshape(-1), num_rows), 0, -1)


def _place(shape: tuple[int, int], group: int) -> Int[Array, "B S"]:
  """Returns the part of its routing group that each token is in."""
  index = jnp.arange(shape[0] * shape[1], dtype=jnp.int32).reshape(shape) % group
  return index * PLACE_BINS // group


def _log_bin(position: Int[Array, "B S"]) -> Int[Array, "B S"]:
  """Returns floor(log2(position + 1)), at most the last bin."""
  edges = jnp.asarray([2**i - 1 for i in range(1, POSITION_BINS)], jnp.int32)
  return jnp.sum(position[..., None] >= edges[None, None], axis=-1, dtype=jnp.int32)


def _sums(
  routes: Routes, valid: Bool[Array, "B S"], losses: Float[Array, "B S"] | None
) -> dict[str, Array]:
  """Returns loads, choices, pairs and flow of one batch; losses if there are any."""
  counted = valid.astype(jnp.float32)
  num_experts = routes.probs.shape[-1]
  served = routes.served.astype(jnp.float32)
  certainty = entropy(routes.probs)
  sums = {
    "tokens": jnp.sum(valid, dtype=jnp.int32),
    "load": jnp.sum(routes.served, axis=(1, 2), dtype=jnp.int32),
    "importance": jnp.einsum("bs,lbse->le", counted, routes.probs),
    "entropy": jnp.einsum("bs,lbs->l", counted, certainty),
    "entropy_bins": _histogram(certainty / np.log(max(num_experts, 2)), valid),
    "pairs": jnp.einsum("lbsi,lbsj->lij", served, served),
    "flow": jnp.einsum("lbsi,lbsj->lij", served[:-1], served[1:]),
  }
  if losses is not None:
    sums["loss"] = jnp.sum(losses)
    sums["loss_by_expert"] = jnp.einsum("bs,lbse->le", losses, served)
  if routes.expert is None:
    return sums
  choices = routes.expert.shape[-1]
  is_choice = jax.nn.one_hot(routes.expert, num_experts, dtype=jnp.bool_)
  assert routes.kept is not None and routes.gate is not None
  sums["by_rank"] = jnp.sum(
    is_choice & routes.kept[..., None], axis=(1, 2), dtype=jnp.int32
  )
  sums["gate"] = jnp.einsum("lbsk,lbske->le", routes.gate, is_choice.astype(jnp.float32))
  if choices < num_experts:
    best = jax.lax.top_k(routes.probs, choices + 1)[0]
    top = jax.lax.top_k(routes.logits, choices + 1)[0]
    margin = best[..., choices - 1] - best[..., choices]
    tied = (top[..., choices - 1] == top[..., choices]) & valid[None]
    sums["margin"] = jnp.einsum("bs,lbs->l", counted, margin)
    sums["margin_bins"] = _histogram(margin, valid)
    sums["ties"] = jnp.sum(tied, axis=(1, 2), dtype=jnp.int32)
  return sums


def _histogram(
  values: Float[Array, "L B S"], valid: Bool[Array, "B S"]
) -> Int[Array, "L W"]:
  """Counts values in [0, 1] in bins of equal width."""
  index = jnp.clip((values * NUM_BINS).astype(jnp.int32), 0, NUM_BINS - 1)

  def count(index: Int[Array, "B S"]) -> Int[Array, "W"]:
    counted = valid.astype(jnp.int32).reshape(-1)
    return jax.ops.segment_sum(counted, index.reshape(-1), NUM_BINS)

  return jax.vmap(count)(index)


def _drops(
  routes: Routes, valid: Bool[Array, "B S"], where: dict[str, tuple[Array, int]]
) -> dict[str, Array]:
  """Returns wanted and dropped assignments, and dropped tokens, by kind of token.

  Without choices (expert choice) only tokens that no expert computes are counted.
  """
  lost = valid[None] & ~jnp.any(routes.served, axis=-1)
  parts = [lost.astype(jnp.int32)]
  if routes.kept is not None:
    dropped = valid[None, ..., None] & ~routes.kept
    parts.append(jnp.sum(dropped, axis=-1, dtype=jnp.int32))
  layers = jnp.stack(parts)  # [1 or 2, L, B, S]
  columns = layers.reshape(-1, valid.size).T
  sums = {}
  for name, (index, size) in where.items():
    index = index.reshape(-1)
    found = jax.ops.segment_sum(columns, index, size)
    found = jnp.moveaxis(found, 0, -1).reshape(*layers.shape[:2], size)
    sums[f"lost_{name}"] = found[0]
    if routes.kept is not None:
      sums[f"dropped_{name}"] = found[1]
    counted = valid.reshape(-1).astype(jnp.int32)
    sums[f"tokens_{name}"] = jax.ops.segment_sum(counted, index, size)
  return sums
