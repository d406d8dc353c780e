"""The decoder-only Transformer language model.

Layers follow a pattern: `dense_prefix` dense layers, then repeats of a unit of
`every` layers, one of them MoE, then the remaining layers. The repeats are one
`jax.lax.scan` over stacked parameters, so compile time does not grow with depth.
Parameters are a plain dict:

  embedding                     [V, D]
  prefix / "0", "1", ...        one block each
  unit   / "0", "1", ...        one block of the unit each, stacked over repeats
  suffix / "0", ...             one block each
  hash_table                    [V, K], if the router has a table; not trained
  norm, head                    final norm; [D, V] unless tied

Letters: B batch, S sequence, D width, V vocabulary, R repeats, L layers.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.config import ModelConfig, MoEConfig
from moejax.config.pattern import Pattern, layer_pattern
from moejax.config.router import make_router
from moejax.layers.attend import Context, attention_masks
from moejax.layers.block import Block, BlockInputs, CallOptions
from moejax.layers.cache import LayerCache, empty_cache
from moejax.layers.embedding import Embedding
from moejax.layers.moe import LayerInputs, MoEAux, loss_weights
from moejax.layers.router import present_experts
from moejax.models.output import Cache, DecoderOutput
from moejax.models.per_layer import PARTS, by_part, windowed_by_part
from moejax.models.stack import Shell, remat, split_key, unrolled
from moejax.routing.base import RouterStats
from moejax.sharding.mesh import on_tokens
from moejax.types import Params

_UNSET: Any = object()

TABLE = "hash_table"
"""Parameter name of a router's table, after the first router that had one."""


class Decoder:
  """A model without its parameters: `init` creates them, a call takes them."""

  def __init__(
    self,
    model: ModelConfig,
    moe: MoEConfig,
    *,
    vocab_size: int,
    token_counts: Callable[[], np.ndarray] | None = None,
  ):
    """Defines a model.

    Args:
      model: config of the Transformer.
      moe: config of its MoE layers.
      vocab_size: size of the tokenizer's vocabulary.
      token_counts: () -> how often each id occurs in the training text; `init` passes
        it to routers with a table.
    """
    self.config, self.moe = model, moe
    self.router = make_router(moe)
    self._token_counts = token_counts
    self.vocab_size = model.vocab_size or vocab_size
    self.pattern = layer_pattern(model.num_layers, moe)
    self._blocks = {is_moe: Shell(self._make_block(is_moe)) for is_moe in (False, True)}
    self._embedding = Shell(
      lambda key: Embedding(model, self.vocab_size, nnx.Rngs(params=key))
    )

  @functools.cached_property
  def unrolled(self) -> "Decoder":
    """The same model with a block of its own for every layer; see `unroll`."""
    model = copy.copy(self)
    model.pattern = Pattern(self.pattern.is_moe, (), (), 0)
    return model

  def unroll(self, params: Params) -> Params:
    """Returns the parameters for `unrolled`: of each layer by itself.

    A stack costs a copy of each layer's weights whenever the layer is run, which decides
    the time of a step of one token.
    """
    flat = {name: value for name, value in params.items() if name not in PARTS}
    blocks: list[Params] = []
    for part in PARTS:
      for repeat in range(self.pattern.repeats if part == "unit" else 1):
        for index in range(len(getattr(self.pattern, part))):
          block = params[part][str(index)]
          if part == "unit":
            block = jax.tree.map(lambda leaf, i=repeat: leaf[i], block)
          blocks.append(block)
    prefix = {str(index): block for index, block in enumerate(blocks)}
    return flat | {"prefix": prefix, "unit": {}, "suffix": {}}

  @property
  def moe_layers(self) -> tuple[int, ...]:
    """Indices of the MoE layers, ordered as in `DecoderOutput.stats`."""
    if self.moe.dense_twin:
      return ()
    return tuple(i for i, is_moe in enumerate(self.pattern.is_moe) if is_moe)

  @property
  def aux_weights(self) -> dict[str, float]:
    """Coefficient of each aux term in the training loss."""
    if not self.moe_layers:
      return {}
    return loss_weights(self.moe)

  @property
  def balances_batch(self) -> bool:
    """Whether microbatches need the assignment counts of their whole batch."""
    return bool(self.moe_layers) and self.moe.balance_scope == "batch"

  @property
  def _has_table(self) -> bool:
    return bool(self.moe_layers) and self.router.has_table

  def init(self, key: Key[Array, ""]) -> Params:
    """Returns newly initialised parameters."""
    embedding_key, *part_keys = jax.random.split(key, 1 + len(PARTS))
    params: Params = {"embedding": self._embedding.init(embedding_key)}
    for part, part_key in zip(PARTS, part_keys, strict=True):
      kinds = getattr(self.pattern, part)
      params[part] = {}
      for index, is_moe in enumerate(kinds):
        block, block_key = self._blocks[is_moe], jax.random.fold_in(part_key, index)
        if part == "unit":
          keys = jax.random.split(block_key, self.pattern.repeats)
          params[part][str(index)] = jax.vmap(block.init)(keys)
        else:
          params[part][str(index)] = block.init(block_key)
    if self._has_table:
      params[TABLE] = self._table()
    return params

  def _table(self) -> Float[Array, "V K"]:
    """Returns the router's table, kept with the parameters to be in every checkpoint.

    In floats, as checkpoints have always stored it.
    """
    table = self.router.table(
      self.vocab_size,
      self.moe.fine_experts,
      self.moe.fine_selected,
      self._token_counts,
    )
    return jnp.asarray(table, jnp.float32)

  def update_routers(self, params: Params, stats: RouterStats) -> Params:
    """Updates the untrained router parameters, once per optimizer step.

    Args:
      params: after the optimizer's update.
      stats: of the whole batch, with a leading axis of MoE layers in order.

    Returns:
      The parameters; unchanged for routers without an update rule.
    """
    params = dict(params)
    for part, blocks in by_part(stats, self.pattern).items():
      params[part] = dict(params[part])
      for name, seen in blocks.items():
        block = params[part][name]
        router = block["moe"]["router"]
        router = router | self.router.update(router, seen)
        params[part][name] = block | {"moe": block["moe"] | {"router": router}}
    return params

  def present_experts(self, key: Key[Array, ""]) -> Bool[Array, "L E"] | None:
    """Samples the experts of each MoE layer that take part in a step; None means all.

    Args:
      key: of the step, so that all its microbatches drop the same experts.
    """
    if not self.moe.expert_dropout or not self.moe_layers:
      return None
    # Disjoint from the microbatch keys, which fold in the microbatch index.
    keys = jax.random.split(jax.random.fold_in(key, 2**31 - 1), len(self.moe_layers))
    return jax.vmap(lambda key: present_experts(key, self.moe))(keys)

  def shapes(self) -> Params:
    """Returns the shape and dtype of every parameter, without allocating it."""
    return jax.eval_shape(lambda: self.init(jax.random.key(0)))

  def logical_axes(self) -> Params:
    """Returns the dimension names of every parameter, for `moejax.sharding.rules`."""

    def stacked(block: Params) -> Params:
      return jax.tree.map(
        lambda names: ("layer", *names), block, is_leaf=lambda a: isinstance(a, tuple)
      )

    axes: Params = {"embedding": self._embedding.axes}
    for part in PARTS:
      blocks = [self._blocks[is_moe].axes for is_moe in getattr(self.pattern, part)]
      axes[part] = {
        str(i): stacked(block) if part == "unit" else block
        for i, block in enumerate(blocks)
      }
    if self._has_table:
      axes[TABLE] = (None, None)
    return axes

  def trained(self) -> Params:
    """Returns which parameters have gradients and are optimized, as a tree of bools."""
    mask: Params = {"embedding": self._embedding.trained}
    for part in PARTS:
      kinds = getattr(self.pattern, part)
      mask[part] = {str(i): self._blocks[kind].trained for i, kind in enumerate(kinds)}
    if self._has_table:
      mask[TABLE] = False
    return mask

  def init_cache(self, batch: int, length: int) -> Cache:
    """Returns an empty cache for `batch` rows of at most `length` tokens."""
    layers: dict[str, dict[str, LayerCache]] = {}
    for part in PARTS:
      stack = (self.pattern.repeats,) if part == "unit" else ()
      layer = empty_cache(self.config, batch, length, *stack)
      kinds = getattr(self.pattern, part)
      layers[part] = {str(i): layer for i in range(len(kinds))}
    empty = jnp.full((batch, length), -1, jnp.int32)
    return Cache(layers=layers, segment_ids=empty, index=jnp.zeros((), jnp.int32))

  def __call__(
    self,
    params: Params,
    tokens: Int[Array, "B S"],
    *,
    segment_ids: Int[Array, "B S"] | None = None,
    positions: Int[Array, "B S"] | None = None,
    key: Key[Array, ""] | None = None,
    train: bool = False,
    capacity_factor: float | None = _UNSET,
    cache: Cache | None = None,
    last_only: bool = False,
    return_served: bool = False,
    batch_chosen: Float[Array, "L E"] | None = None,
    present: Bool[Array, "L E"] | None = None,
    step: Int[Array, ""] | None = None,
  ) -> DecoderOutput:
    """Returns next-token logits at every position.

    Args:
      params: from `init`.
      tokens: vocabulary ids.
      segment_ids: document of each token, 0 for padding; None means one per row.
      positions: within the document; None counts from the row's (or cache's) start.
      key: randomness of this step; required by routers that are random in training.
      train: enables routing noise, and routing groups even if dropless.
      capacity_factor: overrides the configured one; None is dropless.
      cache: keys and values so far; the output has the extended cache.
      last_only: returns the logits of the last position alone, S = 1.
      return_served: whether to return `served`, for analysis.
      batch_chosen: assignments requested per MoE layer in the whole batch, if this is
        one of its microbatches and `balances_batch`.
      present: from `present_experts`, for all microbatches of a step; None samples it
        from `key` in training.
      step: optimizer steps taken, in training.
    """
    if capacity_factor is _UNSET:
      moe = self.moe
      capacity_factor = moe.capacity_factor if train else moe.eval_capacity_factor
    options = CallOptions(
      train=train, capacity_factor=capacity_factor, return_served=return_served
    )
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    context, cache = self._context(segment_ids, positions, cache)
    assigned = None
    if self._has_table:
      assigned = jax.lax.stop_gradient(params[TABLE])[tokens].astype(jnp.int32)
    inputs = BlockInputs(
      context=context,
      valid=segment_ids > 0,
      token_ids=tokens,
      assigned=assigned,
      step=step,
      options=options,
    )
    if present is None and train and key is not None:
      present = self.present_experts(key)
    embedding = self._embedding.merge(params["embedding"])
    x = on_tokens(embedding.embed(tokens, jnp.dtype(self.config.dtype)))
    told = by_part(LayerInputs(batch_chosen=batch_chosen, present=present), self.pattern)
    x, auxes, layers = self._run_blocks(params, x, inputs, key, cache, told)
    if cache is not None:
      cache = dataclasses.replace(cache, layers=layers)
    aux, stats, served = _collect(auxes)
    if last_only:
      x = x[:, -1:]
    return DecoderOutput(
      logits=embedding.logits(x), aux=aux, stats=stats, cache=cache, served=served
    )

  def _make_block(self, is_moe: bool) -> Callable[[Key[Array, ""]], Block]:
    return lambda key: Block(self.config, self.moe, is_moe, nnx.Rngs(params=key))

  def _context(
    self,
    segment_ids: Int[Array, "B S"],
    positions: Int[Array, "B S"] | None,
    cache: Cache | None,
  ) -> tuple[Context, Cache | None]:
    """Returns masks and positions for all layers, and the advanced cache."""
    start = 0 if cache is None else cache.index
    if positions is None:
      row = jnp.arange(segment_ids.shape[1], dtype=jnp.int32) + start
      positions = jnp.broadcast_to(row[None], segment_ids.shape)
    if cache is None:
      masks = attention_masks(self.config, segment_ids, segment_ids)
      return Context(positions=positions, segment_ids=segment_ids, **masks), None
    seen = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.index))
    masks = attention_masks(self.config, segment_ids, seen, offset=cache.index)
    context = Context(
      positions=positions, segment_ids=segment_ids, index=cache.index, **masks
    )
    index = cache.index + segment_ids.shape[1]
    return context, dataclasses.replace(cache, segment_ids=seen, index=index)

  def _run_blocks(
    self,
    params: Params,
    x: Float[Array, "B S D"],
    inputs: BlockInputs,
    key: Key[Array, ""] | None,
    cache: Cache | None,
    told: dict[str, dict[str, LayerInputs]],
  ) -> tuple[Float[Array, "B S D"], list[MoEAux], dict[str, dict[str, LayerCache]]]:
    """Runs prefix, repeated units and suffix; each aux has a leading layer axis."""
    auxes: list[MoEAux] = []
    layers: dict[str, dict[str, LayerCache]] = {}
    windowed = windowed_by_part(self.config, self.pattern)
    for number, part in enumerate(PARTS):
      kinds = getattr(self.pattern, part)
      part_key = None if key is None else jax.random.fold_in(key, number)
      part_cache = {} if cache is None else cache.layers[part]
      repeats = self.pattern.repeats if part == "unit" else 1
      stacked = (params[part], part_cache, told[part], windowed[part])
      if part != "unit":
        stacked = jax.tree.map(lambda leaf: leaf[None], stacked)
      stacked = (*stacked, split_key(part_key, repeats))
      if not kinds:
        layers[part] = {}
        continue

      def unit(x: Any, layer: Any, kinds: tuple[bool, ...] = kinds) -> Any:
        return self._unit(kinds, x, inputs, *layer)

      in_scan = self.config.scan_layers and repeats > 1
      policy = self.config.remat if inputs.options.train else "none"
      unit = remat(unit, policy, in_scan=in_scan)
      if in_scan:
        x, (aux, new_cache) = jax.lax.scan(unit, x, stacked)
      else:
        x, (aux, new_cache) = unrolled(unit, x, stacked, repeats)
      # [repeats, MoE layers of the unit, ...] -> [MoE layers, ...]
      if aux is not None:
        auxes.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux))
      if part != "unit":
        new_cache = jax.tree.map(lambda leaf: leaf[0], new_cache)
      layers[part] = new_cache
    return x, auxes, layers

  def _unit(
    self,
    kinds: tuple[bool, ...],
    x: Float[Array, "B S D"],
    inputs: BlockInputs,
    params: Params,
    cache: dict[str, LayerCache],
    told: dict[str, LayerInputs],
    windowed: dict[str, Bool[Array, ""]],
    key: Key[Array, ""] | None,
  ) -> tuple[Float[Array, "B S D"], tuple[MoEAux | None, dict[str, LayerCache]]]:
    """Runs the blocks of one repeat in order and stacks their aux."""
    auxes, new_cache = [], {}
    for index, is_moe in enumerate(kinds):
      name = str(index)
      block = self._blocks[is_moe].merge(params[name])
      block_key = None if key is None else jax.random.fold_in(key, index)
      own = inputs.of_layer(windowed.get(name))
      x, aux, layer = block(
        x, own, key=block_key, cache=cache.get(name), layer=told.get(name)
      )
      if aux is not None:
        auxes.append(aux)
      if layer is not None:
        new_cache[name] = layer
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *auxes) if auxes else None
    return x, (stacked, new_cache)


def _collect(
  auxes: list[MoEAux],
) -> tuple[
  dict[str, Float[Array, ""]], RouterStats | None, Bool[Array, "L B S E"] | None
]:
  """Concatenates the MoE layers of all parts in order and sums their losses."""
  if not auxes:
    return {}, None, None
  joined = jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)
  losses = {name: jnp.sum(value) for name, value in joined.losses.items()}
  return losses, joined.stats, joined.served
