"""Evaluation: the loss of every token of a split, under one or more capacities.

Per-token losses are summed by domain in float64 on the host, so that the result does
not depend on how sequences are batched. `groups` defines the routing groups and batch
sizes that keep them whole. Empty rows of the last batch are padding and take no slot.

Letters: B batch, S sequence, E experts, L MoE layers, R domains, V vocabulary.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from moejax.config import MeshConfig, MoEConfig
from moejax.config.mesh import mesh_shape
from moejax.config.ranges import RANGES
from moejax.errors import ConfigError, UserError
from moejax.launch import hang
from moejax.models.decoder import Decoder
from moejax.models.loss import Batch, to_devices, token_losses
from moejax.models.placement import param_shardings
from moejax.routing.base import RouterStats
from moejax.run import metrics
from moejax.sharding import rules
from moejax.types import Params

DROPLESS = "dropless"

Sums = dict[str, Any]
"""Sums for one capacity factor: `nll` float64 [R], `stats` RouterStats or None."""


class EvalBatch(Batch):
  """Rows of a batch on the devices, with their domains."""

  domain: Int[jax.Array, "B S"]


def parse_capacity_factors(text: str) -> tuple[float | None, ...]:
  """Parses `1,1.25,2,dropless`; None stands for dropless. Duplicates are removed.

  Raises:
    UserError: an entry is not a capacity factor, `dropless` or `none`.
  """
  factors: list[float | None] = []
  for word in text.split(","):
    word = word.strip().lower()
    try:
      factor = None if word in (DROPLESS, "none") else float(word)
    except ValueError:
      factor = math.nan
    allowed = RANGES["moe.eval_capacity_factor"]
    if factor is not None and factor not in allowed:
      raise UserError(
        f"--eval_capacity_factor={text}: {word!r} is not a capacity factor. Give numbers "
        f"{allowed}, or dropless, separated by commas, for example 1,1.25,2,dropless."
      )
    if factor not in factors:
      factors.append(factor)
  return tuple(factors)


def own_factors(moe: MoEConfig, has_experts: bool) -> tuple[float | None, ...]:
  """Returns the capacity factors that a run is evaluated under by default.

  First the configured one, which represents the run; then that of training, under which
  more tokens may be dropped.
  """
  if not has_experts:
    return (None,)
  factors = moe.eval_capacity_factor, moe.capacity_factor
  return factors[:1] if factors[1] is None or factors[0] == factors[1] else factors


def spelled(factor: float | None) -> float | str:
  """Returns a capacity factor as written in the files of evaluations."""
  return DROPLESS if factor is None else factor


def choose_mesh(mesh: MeshConfig, num_devices: int | None = None) -> MeshConfig:
  """Returns the run's mesh if the devices fit it, else all devices as replicas."""
  num_devices = jax.device_count() if num_devices is None else num_devices
  try:
    mesh_shape(mesh, num_devices)
  except ConfigError:
    return MeshConfig()
  return mesh


def check_params(model: Decoder, params: Params) -> None:
  """Checks that the model, with its overrides, has the checkpoint's parameters.

  Raises:
    ConfigError: names the first parameter whose shape differs.
  """
  theirs, ours = _named_shapes(params), _named_shapes(model.shapes())
  for name in sorted(theirs | ours):
    if theirs.get(name) != ours.get(name):
      raise ConfigError(
        f"The flags describe a different model from the checkpoint's: {name} is "
        f"{ours.get(name, 'absent')} here and {theirs.get(name, 'absent')} there. Leave "
        "out the --config.model and --config.moe flags that change sizes."
      )


def _named_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
  return {name(path): tuple(leaf.shape) for path, leaf in leaves}


def make_step(
  model: Decoder, mesh: Mesh, capacity_factor: float | None
) -> Callable[[Params, Batch], tuple[Float[jax.Array, "B S"], RouterStats | None]]:
  """Returns a jitted (params, batch) -> (loss of each token, 0 on padding; stats)."""

  def step(params: Params, batch: Batch) -> tuple[Any, RouterStats | None]:
    losses, out = token_losses(model, params, batch, capacity_factor=capacity_factor)
    return losses, out.stats

  return jax.jit(
    step,
    in_shardings=(param_shardings(model, mesh), rules.batch_sharding(mesh)),
    out_shardings=rules.replicated(mesh),
  )


def device_batches(
  dataset: Any, split: str, *, mesh: Mesh, batch_size: int, limit: int = 0
) -> Iterator[EvalBatch]:
  """Yields the batches of a split, each token once, on the devices of the mesh."""
  rows = rules.local_rows(mesh, batch_size)
  for batch in dataset.eval_batches(split, batch_size, limit, rows=rows):
    domain = rules.put_rows(mesh, batch["domain"])
    yield {**to_devices(batch, mesh), "domain": domain}


def evaluate(
  model: Decoder,
  params: Params,
  dataset: Any,
  *,
  split: str,
  mesh: Mesh,
  batch_size: int,
  capacity_factors: Sequence[float | None] = (None,),
  limit: int = 0,
  progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
  """Returns a split's losses and router statistics, per capacity factor and domain.

  Args:
    model: from `groups.make_model`.
    params: its parameters, on any devices; they are moved to the mesh.
    dataset: from `moejax.data.load`.
    split: train, validation or test.
    mesh: of the evaluation.
    batch_size: sequences per step, from `groups.batch_size`.
    capacity_factors: all evaluated on each batch; None means dropless. A model without
      MoE layers is evaluated once.
    limit: maximum number of batches; 0 means all.
    progress: called with the number of tokens evaluated so far.

  Returns:
    JSON-ready: split, tokens, split_tokens (of the whole split), bytes, seconds,
    tokens_per_second (of all factors, including compilation) and `results`, one per
    factor, with loss (nats/token), bits_per_byte, perplexity, dropped_fraction, layers
    and domains.

  Raises:
    UserError: the split has no text.
  """
  began = time.perf_counter()
  factors = tuple(capacity_factors) if model.moe_layers else (None,)
  token_bytes = np.asarray(dataset.token_bytes, np.int64)
  totals = _Totals(len(factors), max(len(dataset.domains), 1), token_bytes)
  batches = device_batches(dataset, split, mesh=mesh, batch_size=batch_size, limit=limit)
  _run(model, params, batches, mesh, factors, totals, progress or (lambda tokens: None))
  if not totals.tokens.sum():
    raise UserError(
      f"--split={split} has no text in this dataset. Choose another split, or raise "
      f"--config.data.{split}_fraction."
    )
  seconds = time.perf_counter() - began
  return {
    "split": split,
    "tokens": int(totals.tokens.sum()),
    "split_tokens": dataset.num_tokens(split),
    "bytes": int(totals.bytes.sum()),
    "seconds": seconds,
    "tokens_per_second": float(totals.tokens.sum()) * len(factors) / seconds,
    "results": [
      {"eval_capacity_factor": spelled(factor)}
      | totals.result(index, model.moe_layers, dataset.domains)
      for index, factor in enumerate(factors)
    ],
  }


def _run(
  model: Decoder,
  params: Params,
  batches: Iterator[EvalBatch],
  mesh: Mesh,
  factors: Sequence[float | None],
  totals: "_Totals",
  progress: Callable[[int], None],
) -> None:
  """Adds all batches, under each capacity factor, to the totals."""
  steps = [make_step(model, mesh, factor) for factor in factors]
  params = jax.device_put(params, param_shardings(model, mesh))
  gather = jax.jit(lambda x: x, out_shardings=rules.replicated(mesh))
  pending = None
  # Without a mesh in scope, layers would leave the exchange between devices to the
  # compiler.
  with jax.set_mesh(mesh):
    for batch in batches:
      where = gather(
        {
          "targets": batch["targets"],
          "segment_ids": batch["segment_ids"],
          "domain": batch["domain"],
        }
      )
      outputs = [step(params, batch) for step in steps]
      # Fetches the previous batch's losses while this batch is computed.
      totals.add(pending)
      pending = (where, outputs)
      progress(int(totals.tokens.sum()))
  totals.add(pending)


def headline(evaluation: dict[str, Any], factor: float | None) -> dict[str, Any]:
  """Returns loss, bits_per_byte and dropped_fraction for one factor, else the first.

  Args:
    evaluation: from `evaluate`.
    factor: the configured one, which represents the run.
  """
  name = spelled(factor)
  results = evaluation["results"]
  chosen = [r for r in results if r["eval_capacity_factor"] == name] or results
  keys = ("loss", "bits_per_byte", "dropped_fraction")
  return {key: chosen[0][key] for key in keys if key in chosen[0]}


class _Totals:
  """Sums over batches, on the host, in float64 and int64."""

  def __init__(
    self, num_factors: int, num_domains: int, token_bytes: Int[np.ndarray, "V"]
  ):
    self._token_bytes = token_bytes
    self.tokens = np.zeros(num_domains, np.int64)
    self.bytes = np.zeros(num_domains, np.int64)
    self.nll = np.zeros((num_factors, num_domains), np.float64)
    self.stats: list[RouterStats | None] = [None] * num_factors

  def add(self, fetched: Any) -> None:
    """Adds one batch: its arrays and each factor's (losses, stats); ignores None."""
    if fetched is None:
      return
    where, outputs = jax.device_get(fetched)
    hang.progress()
    valid = where["segment_ids"] > 0
    domain = where["domain"][valid]
    count = functools.partial(np.bincount, domain, minlength=len(self.tokens))
    self.tokens += count()
    num_bytes = self._token_bytes[where["targets"][valid]].astype(np.float64)
    self.bytes += count(weights=num_bytes).astype(np.int64)
    for index, (losses, stats) in enumerate(outputs):
      self.nll[index] += count(weights=losses[valid].astype(np.float64))
      if stats is not None:
        stats = jax.tree.map(lambda x: np.asarray(x, np.float64), stats)
        old = self.stats[index]
        self.stats[index] = stats if old is None else jax.tree.map(np.add, old, stats)

  def result(
    self, index: int, moe_layers: Sequence[int], domains: Sequence[str]
  ) -> dict[str, Any]:
    """Returns the results of one capacity factor; domains without tokens are omitted."""
    nll = self.nll[index]
    out = _losses(nll.sum(), int(self.tokens.sum()), int(self.bytes.sum()))
    stats = self.stats[index]
    if stats is not None:
      out["dropped_fraction"] = metrics.dropped_fraction(stats)
      out["layers"] = _layers(stats, moe_layers)
    out["domains"] = {
      name: _losses(nll[i], int(self.tokens[i]), int(self.bytes[i]))
      for i, name in enumerate(domains)
      if self.tokens[i]
    }
    return out


def _losses(nll: float, tokens: int, num_bytes: int) -> dict[str, Any]:
  loss = float(nll) / tokens
  return {
    "loss": loss,
    "bits_per_byte": float(nll) / math.log(2) / num_bytes if num_bytes else None,
    # Capped to stay in float range; beyond it, the loss has the same information.
    "perplexity": math.exp(min(loss, 700.0)),
    "tokens": tokens,
    "bytes": num_bytes,
  }


def _layers(stats: RouterStats, moe_layers: Sequence[int]) -> list[dict[str, Any]]:
  """Returns each MoE layer's index in the model, expert loads and ratios."""
  values = metrics.layer_metrics(stats)
  return [
    {"layer": layer} | {name: value[i].tolist() for name, value in values.items()}
    for i, layer in enumerate(moe_layers)
  ]
