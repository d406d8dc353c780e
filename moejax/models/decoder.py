"""The decoder-only Transformer language model.

Parameters are a plain dict:

  embedding                     table [V, D], final norm [D], head [D, V] unless tied
  prefix, unit, suffix          the blocks, see `models/stack`
  relative_bias                 under relative positions
  hash_table                    [V, K], if the router has a table; not trained

Letters: B batch, S sequence, D width, V vocabulary, L layers.
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

from moejax import parts
from moejax.config import ModelConfig, MoEConfig
from moejax.config.pattern import Pattern
from moejax.config.router import CONFIGURED, factor_of
from moejax.layers.attend import Context, attention_masks
from moejax.layers.block import BlockInputs, CallOptions
from moejax.layers.embedding import Embedding, TokenTable
from moejax.layers.moe import LayerInputs, loss_weights
from moejax.models import trained as trained_lib
from moejax.models.frozen import Masks, masks
from moejax.models.output import Cache, DecoderOutput, collect
from moejax.models.per_layer import PARTS
from moejax.models.shell import Shell
from moejax.models.stack import Stack
from moejax.routing.base import RouterStats
from moejax.routing.router import Router
from moejax.sharding.mesh import on_tokens
from moejax.types import Params

TABLE = "hash_table"
"""Parameter name of a router's table, named after the first router that had one."""


class Decoder:
  """A model without its parameters: `init` creates them, a call takes them."""

  def __init__(
    self,
    model: ModelConfig,
    moe: MoEConfig,
    *,
    vocab_size: int,
    token_counts: Callable[[], np.ndarray] | None = None,
    frozen: str = "",
  ):
    """Defines a model.

    Args:
      model: config of the Transformer.
      moe: config of its MoE layers.
      vocab_size: size of the tokenizer's vocabulary.
      token_counts: () -> how often each id occurs in the training text; `init` passes
        it to routers with a table.
      frozen: selectors of parameters that are not trained, `train.frozen`.
    """
    self._frozen = frozen
    self.config, self.moe = model, moe
    self._token_counts = token_counts
    self.vocab_size = model.vocab_size or vocab_size
    self.stacks = self._make_stacks()
    self._embedding = Shell(
      lambda key: Embedding(model, self.vocab_size, nnx.Rngs(params=key))
    )

  def _make_stacks(self) -> dict[str, Stack]:
    """Returns the stacks by parameter name; "" puts them next to the embedding."""
    return {"": Stack(self.config, self.moe)}

  @property
  def stack(self) -> Stack:
    """The decoder's stack."""
    return self.stacks[""]

  @property
  def router(self) -> Router:
    """The decoder's router."""
    return self.stack.router

  @property
  def pattern(self) -> Pattern:
    """The decoder's pattern of MoE layers."""
    return self.stack.pattern

  @functools.cached_property
  def unrolled(self) -> "Decoder":
    """The same model with a separate block for every layer; see `unroll`."""
    model = copy.copy(self)
    model.stacks = {name: stack.unrolled() for name, stack in self.stacks.items()}
    return model

  def unroll(self, params: Params) -> Params:
    """Returns the parameters for `unrolled`, separate for each layer.

    A stack costs a copy of each layer's weights whenever the layer runs, which determines
    the time of a one-token step.
    """
    params = dict(params)
    for name, stack in self.stacks.items():
      params |= _under(name, stack.unroll(params[name] if name else params))
    return params

  @property
  def moe_layers(self) -> tuple[int, ...]:
    """Indices of the MoE layers, ordered as in `DecoderOutput.stats`."""
    found: list[int] = []
    before = 0
    for stack in self.stacks.values():
      found += [before + layer for layer in stack.moe_layers]
      before += stack.config.num_layers
    return tuple(found)

  @property
  def aux_weights(self) -> dict[str, float]:
    """Coefficient of each aux term in the training loss."""
    weights: dict[str, float] = {}
    for stack in self.stacks.values():
      if stack.moe_layers:
        weights |= loss_weights(stack.moe)
    return weights

  @property
  def balances_batch(self) -> bool:
    """Whether microbatches need the assignment counts of their whole batch."""
    return bool(self.moe_layers) and self.moe.balance_scope == "batch"

  @property
  def _has_table(self) -> bool:
    return any(s.moe_layers and s.router.has_table for s in self.stacks.values())

  def init(self, key: Key[Array, ""]) -> Params:
    """Returns newly initialised parameters."""
    embedding_key, *part_keys = jax.random.split(key, 1 + len(PARTS))
    params: Params = {"embedding": self._embedding.init(embedding_key)}
    for number, (name, stack) in enumerate(reversed(self.stacks.items())):
      own = part_keys
      if number:
        # Disjoint from the keys of the decoder's blocks, which fold in their index.
        own = [jax.random.fold_in(key, 2**31 - 1 - number) for key in part_keys]
      params |= _under(name, stack.init(own))
    if self._has_table:
      params[TABLE] = self._table()
    return params

  def _table(self) -> Float[Array, "V K"]:
    """Returns the router's table, stored with the parameters in every checkpoint.

    It is in floats, as checkpoints have always stored it.
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
    params, before, used = dict(params), params, 0
    for name, stack in self.stacks.items():
      here = slice(used, used + len(stack.moe_layers))
      used = here.stop
      own = jax.tree.map(lambda leaf, here=here: leaf[here], stats)
      below = params[name] if name else params
      params |= _under(name, stack.update_routers(below, own))
    if self.frozen is not None:
      params = trained_lib.restore(params, before, self.frozen.by_rule)
    return params

  def present_experts(self, key: Key[Array, ""]) -> Bool[Array, "L E"] | None:
    """Samples the experts of each MoE layer that take part in a step; None means all.

    Args:
      key: of the step, so that all its microbatches drop the same experts.
    """
    found = []
    for number, stack in enumerate(reversed(self.stacks.values())):
      own = jax.random.fold_in(key, 2**31 - 1 - number) if number else key
      present = stack.present_experts(own)
      if present is not None:
        found.insert(0, present)
    return jnp.concatenate(found) if found else None

  def shapes(self) -> Params:
    """Returns the shape and dtype of every parameter, without allocating it."""
    table = jax.eval_shape(self._table) if self._has_table else None
    shapes = self._collected(self._embedding.shapes, Stack.shapes, table)
    # In the order of a tree that jax returns.
    return jax.tree.map(lambda leaf: leaf, shapes)

  def logical_axes(self) -> Params:
    """Returns the dimension names of every parameter, for `moejax.sharding.rules`."""
    return self._collected(self._embedding.axes, Stack.logical_axes, (None, None))

  def trained(self) -> Params:
    """Returns which parameters have gradients and are optimized, as a mask."""
    return self._declared() if self.frozen is None else self.frozen.trained

  @functools.cached_property
  def frozen(self) -> Masks | None:
    """The parameters that `train.frozen` selects; None if it selects nothing.

    Raises:
      ConfigError: a selector does not fit this model.
    """
    if not self._frozen:
      return None
    shapes, axes = self.shapes(), self.logical_axes()
    return masks(self._frozen, self._declared(), axes, shapes)

  def _declared(self) -> Params:
    """Returns which parameters are trained if nothing is frozen."""
    return self._collected(self._embedding.trained, Stack.trained, False)

  def _collected(
    self, embedding: Params, of_stack: Callable[[Stack], Params], table: Any
  ) -> Params:
    """Returns a tree like the parameters' from what each part says of its own."""
    found: Params = {"embedding": embedding}
    for name, stack in self.stacks.items():
      found |= _under(name, of_stack(stack))
    if self._has_table:
      found[TABLE] = table
    return found

  def init_cache(self, batch: int, length: int) -> Cache:
    """Returns an empty cache for `batch` rows of at most `length` tokens."""
    layers = self.stack.init_cache(batch, length)
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
    capacity_factor: float | None = CONFIGURED,
    cache: Cache | None = None,
    last_only: bool = False,
    return_served: bool = False,
    return_routes: bool = False,
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
      capacity_factor: overrides the configured one; None means dropless.
      cache: keys and values so far; the output has the extended cache.
      last_only: returns the logits of the last position only, S = 1.
      return_served: whether to return `served`, for analysis.
      return_routes: whether to return `routes`, for analysis.
      batch_chosen: assignments requested per MoE layer in the whole batch, if this is
        one of its microbatches and `balances_batch`.
      present: from `present_experts`, for all microbatches of a step; None samples it
        from `key` in training. In evaluation, the experts that may be chosen.
      step: optimizer steps taken, in training.
    """
    options = CallOptions(
      train=train,
      capacity_factor=factor_of(self.moe, capacity_factor, train=train),
      return_served=return_served,
      return_routes=return_routes,
    )
    x, inputs, cache = self.begin(
      *(params, tokens, options),
      segment_ids=segment_ids,
      positions=positions,
      cache=cache,
      step=step,
    )
    if present is None and train and key is not None:
      present = self.present_experts(key)
    told = LayerInputs(batch_chosen=batch_chosen, present=present)
    x, auxes, layers = self.stack.run(
      *(params, x, inputs, key, told), cache=None if cache is None else cache.layers
    )
    if cache is not None:
      cache = dataclasses.replace(cache, layers=layers)
    aux, stats, asked = collect(auxes)
    logits = self.finish(params, x[:, -1:] if last_only else x)
    return DecoderOutput(logits=logits, aux=aux, stats=stats, cache=cache, **asked)

  def begin(
    self,
    params: Params,
    tokens: Int[Array, "B S"],
    options: CallOptions,
    *,
    segment_ids: Int[Array, "B S"] | None = None,
    positions: Int[Array, "B S"] | None = None,
    cache: Cache | None = None,
    step: Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, "B S D"], BlockInputs, Cache | None]:
    """Returns the first block's input, the inputs of all blocks, and the advanced cache.

    To run the blocks one by one: call this, then `stack.block` for each, then `finish`.
    """
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    context, cache = self._context(segment_ids, positions, cache)
    inputs = self._inputs(
      params, tokens, self._biased(params, context, cache), step=step, options=options
    )
    return self._embed(params, tokens), inputs, cache

  def _embed(
    self, params: Params, tokens: Int[Array, "B S"], own: TokenTable | None = None
  ) -> Float[Array, "B S D"]:
    """Looks tokens up in a stack's own table, or in the model's."""
    table = self._embedding.merge(params["embedding"]) if own is None else own
    with parts.scope(parts.EMBEDDING):
      return on_tokens(table.embed(tokens, jnp.dtype(self.config.dtype)))

  def finish(self, params: Params, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
    """Returns the logits, given the last block's output."""
    with parts.scope(parts.HEAD):
      return self._embedding.merge(params["embedding"]).logits(x)

  def _inputs(
    self, params: Params, tokens: Int[Array, "B S"], context: Context, **others: Any
  ) -> BlockInputs:
    """Returns the inputs of all blocks; a table gives each token its experts."""
    assigned = None
    if self._has_table:
      assigned = jax.lax.stop_gradient(params[TABLE])[tokens].astype(jnp.int32)
    return BlockInputs(
      context=context,
      valid=context.segment_ids > 0,
      token_ids=tokens,
      assigned=assigned,
      **others,
    )

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

  def _biased(self, below: Params, context: Context, cache: Cache | None) -> Context:
    """Adds the bias of relative positions to the decoder's context, if there is one."""
    num_queries = context.positions.shape[1]
    if cache is None:
      bias = self.stack.bias(below, num_queries, num_queries)
    else:
      assert context.index is not None
      num_keys = cache.segment_ids.shape[1]
      bias = self.stack.bias(below, num_queries, num_keys, context.index)
    return context if bias is None else dataclasses.replace(context, bias=bias)


def _under(name: str, params: Params) -> Params:
  """Returns the parameters below a name, or all of them if it is empty."""
  return {name: params} if name else params
