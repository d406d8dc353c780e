"""The encoder-decoder Transformer (T5, Switch, ST-MoE).

An encoder reads the whole input in both directions; a decoder predicts the targets one
after the other and attends to the encoder's output in each block. Both are stacks of the
same blocks (`models/stack`), each with its own pattern of MoE layers, and share one
embedding (or the encoder has its own). Parameters are a plain dict:

  embedding                     table [V, D], the decoder's final norm [D], head [D, V]
                                unless tied
  encoder / ...                 a stack, with its final norm
  decoder / ...                 a stack, with cross-attention in each block
  hash_table                    [V, K], if the routers have a table; not trained

T5 without attention scale is `attention_scale=1`, its tied head of scale D^-0.5 is
`logits_divisor=D**0.5`, and its biases are `positions=relative`.

Letters: B batch, S decoder's sequence, M encoder's sequence, D width, E experts, V
vocabulary, L MoE layers: the encoder's first, then the decoder's.
Sources: T5, arXiv:1910.10683, section 2.1; Switch, arXiv:2101.03961; ST-MoE,
arXiv:2202.08906. As in t5x there is no dropout here, and cross-attention has no bias.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.config.encoder import encoder_model, encoder_moe
from moejax.config.router import CONFIGURED, factor_of
from moejax.layers.attend import Context, attend_to_all
from moejax.layers.block import BlockInputs, CallOptions
from moejax.layers.moe import LayerInputs, MoEAux
from moejax.models.decoder import Decoder
from moejax.models.output import Cache, DecoderOutput, Memory, collect
from moejax.models.stack import Stack
from moejax.routing.base import RouterStats
from moejax.types import Params

_ENCODER_KEY = 2**31 - 3
"""Folded into a step's key for the encoder; the decoder's parts fold in their number."""


class EncoderDecoder(Decoder):
  """A decoder with an encoder: a call also takes the encoder's tokens."""

  def _make_stacks(self) -> dict[str, Stack]:
    encoder = encoder_model(self.config), encoder_moe(self.moe)
    own = self.vocab_size if self.config.encoder_embedding else 0
    return {
      "encoder": Stack(*encoder, is_encoder=True, vocab_size=own),
      "decoder": Stack(self.config, self.moe, has_cross=True),
    }

  @property
  def encoder(self) -> Stack:
    return self.stacks["encoder"]

  @property
  def stack(self) -> Stack:
    return self.stacks["decoder"]

  def __call__(
    self,
    params: Params,
    tokens: Int[Array, "B S"],
    *,
    encoder_tokens: Int[Array, "B M"] | None = None,
    encoder_segment_ids: Int[Array, "B M"] | None = None,
    encoder_positions: Int[Array, "B M"] | None = None,
    encoder_weight: Float[Array, ""] | float | None = None,
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
    """Returns logits of the next target at every position of the decoder.

    Args:
      params: from `init`.
      tokens: the decoder's: the start token, then the targets so far.
      encoder_tokens: the whole input; omitted with a cache, which holds its keys and
        values.
      encoder_segment_ids: which segment of the decoder reads each, 0 for padding; None
        means one per row.
      encoder_positions: within the segment; None counts from the row's start.
      encoder_weight: multiplies the encoder's aux sums. With the whole batch's ratio of
        targets to encoder tokens, the sums divided by its targets are means. None means
        the ratio of this call.
      segment_ids: of the decoder; the rest as in `Decoder`.
      positions: of the decoder.
      key: randomness of this step.
      train: as in `Decoder`.
      capacity_factor: as in `Decoder`, of both stacks.
      cache: from `start`.
      last_only: as in `Decoder`.
      return_served: as in `Decoder`, of the decoder's MoE layers only.
      return_routes: of both stacks, as `routes` and `encoder_routes`.
      batch_chosen: as in `Decoder`.
      present: as in `Decoder`.
      step: as in `Decoder`.
    """
    segment_ids = _segments(tokens, segment_ids)
    if present is None and train and key is not None:
      present = self.present_experts(key)
    told = LayerInputs(batch_chosen=batch_chosen, present=present)
    used = len(self.encoder.moe_layers)
    options = CallOptions(
      train=train,
      capacity_factor=factor_of(self.moe, capacity_factor, train=train),
      return_served=return_served,
      return_routes=return_routes,
    )
    memory, auxes = None, []
    if cache is None:
      assert encoder_tokens is not None
      seen = _segments(encoder_tokens, encoder_segment_ids)
      memory, auxes = self._encode(
        *(params, encoder_tokens, seen, encoder_positions),
        key=key,
        told=jax.tree.map(lambda leaf: leaf[:used], told),
        step=step,
        options=options,
        capacity_factor=capacity_factor,
      )
    else:
      assert cache.memory is not None
      seen = cache.memory.segment_ids
    context, cache = self._context(segment_ids, positions, cache)
    inputs = self._inputs(
      *(params, tokens, self._biased(params["decoder"], context, cache)),
      step=step,
      options=options,
      memory=memory,
      cross=_across(context, seen),
    )
    told = jax.tree.map(lambda leaf: leaf[used:], told)
    x, mine, cache = self._decode(params, tokens, inputs, key, told, cache)
    if encoder_weight is None:
      encoder_weight = _targets_per_token(segment_ids, seen)
    aux, stats, asked = _joined(auxes, mine, encoder_weight)
    if last_only:
      x = x[:, -1:]
    return DecoderOutput(
      logits=self.finish(params, x), aux=aux, stats=stats, cache=cache, **asked
    )

  def start(
    self,
    params: Params,
    encoder_tokens: Int[Array, "B M"],
    *,
    length: int,
    segment_ids: Int[Array, "B M"] | None = None,
    capacity_factor: float | None = CONFIGURED,
  ) -> Cache:
    """Reads the input once and returns the cache to decode with.

    Args:
      params: from `init`.
      encoder_tokens: one input per row.
      length: maximum number of decoded tokens.
      segment_ids: 0 for padding, 1 elsewhere; None is no padding.
      capacity_factor: as in a call.
    """
    segment_ids = _segments(encoder_tokens, segment_ids)
    options = CallOptions(
      train=False, capacity_factor=factor_of(self.moe, capacity_factor, train=False)
    )
    memory, _ = self._encode(
      *(params, encoder_tokens, segment_ids, None),
      key=None,
      told=LayerInputs(),
      step=None,
      options=options,
      capacity_factor=capacity_factor,
    )
    read = self.stack.remember(params["decoder"], memory)
    cache = self.init_cache(encoder_tokens.shape[0], length)
    return dataclasses.replace(cache, memory=Memory(layers=read, segment_ids=segment_ids))

  def _encode(
    self,
    params: Params,
    tokens: Int[Array, "B M"],
    segment_ids: Int[Array, "B M"],
    positions: Int[Array, "B M"] | None,
    *,
    key: Key[Array, ""] | None,
    told: LayerInputs,
    step: Int[Array, ""] | None,
    options: CallOptions,
    capacity_factor: Any,
  ) -> tuple[Float[Array, "B M D"], list[MoEAux]]:
    """Runs the encoder, whose router may need slots where the decoder's does not."""
    factor = factor_of(self.encoder.moe, capacity_factor, train=options.train)
    if self.encoder.moe_layers and self.encoder.router.needs_capacity:
      own = self.encoder.moe.eval_capacity_factor
      fixed = self.encoder.router.fixed_slots
      factor = own if factor is None or fixed else factor
    options = dataclasses.replace(options, capacity_factor=factor, return_served=False)
    length = tokens.shape[1]
    if positions is None:
      row = jnp.arange(length, dtype=jnp.int32)
      positions = jnp.broadcast_to(row[None], tokens.shape)
    own = params["encoder"]
    context = Context(
      positions=positions,
      segment_ids=segment_ids,
      mask=attend_to_all(segment_ids, segment_ids),
      bias=self.encoder.bias(own, length, length),
      is_causal=False,
    )
    inputs: BlockInputs = self._inputs(
      params, tokens, context, step=step, options=options
    )
    x = self._embed(params, tokens, self.encoder.embedding(own))
    if key is not None:
      key = jax.random.fold_in(key, _ENCODER_KEY)
    x, auxes, _ = self.encoder.run(own, x, inputs, key, told)
    return self.encoder.normalise(own, x), auxes

  def _decode(
    self,
    params: Params,
    tokens: Int[Array, "B S"],
    inputs: BlockInputs,
    key: Key[Array, ""] | None,
    told: LayerInputs,
    cache: Cache | None,
  ) -> tuple[Float[Array, "B S D"], list[MoEAux], Cache | None]:
    """Runs the decoder's blocks and adds their keys and values to the cache."""
    own, x = params["decoder"], self._embed(params, tokens)
    if cache is None:
      x, auxes, _ = self.stack.run(own, x, inputs, key, told)
      return x, auxes, None
    assert cache.memory is not None
    x, auxes, layers = self.stack.run(
      *(own, x, inputs, key, told), cache=cache.layers, remembered=cache.memory.layers
    )
    return x, auxes, dataclasses.replace(cache, layers=layers)


def _segments(
  tokens: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None
) -> Int[Array, "B S"]:
  """Returns the segments, one per row if none are given."""
  return jnp.ones_like(tokens) if segment_ids is None else segment_ids


def _across(context: Context, seen: Int[Array, "B M"]) -> Context:
  """Returns the context of cross-attention: a segment reads the segment it restores."""
  return Context(
    positions=context.positions,
    segment_ids=context.segment_ids,
    mask=attend_to_all(context.segment_ids, seen),
    index=context.index,
    is_causal=False,
  )


def _targets_per_token(
  segment_ids: Int[Array, "B S"], seen: Int[Array, "B M"]
) -> Float[Array, ""]:
  """Returns the ratio of targets to encoder tokens of this call, without padding."""
  targets, tokens = (jnp.sum(s > 0, dtype=jnp.float32) for s in (segment_ids, seen))
  return targets / jnp.maximum(tokens, 1.0)


def _joined(
  encoder: list[MoEAux], decoder: list[MoEAux], weight: Float[Array, ""] | float
) -> tuple[dict[str, Float[Array, ""]], RouterStats | None, dict[str, Any]]:
  """Joins the MoE layers' results of both stacks, the encoder's first."""
  losses, stats, read = collect(encoder)
  losses = {name: value * weight for name, value in losses.items()}
  own, own_stats, asked = collect(decoder)
  asked["encoder_routes"] = read.get("routes")
  for name, value in own.items():
    losses[name] = losses[name] + value if name in losses else value
  if stats is None or own_stats is None:
    return losses, own_stats if stats is None else stats, asked
  # Sums that only the router of one stack has are 0 in the other.
  sums = {**stats.extra, **own_stats.extra}

  def filled(stats: RouterStats) -> RouterStats:
    layers = stats.num_valid.shape[0]
    extra = {
      name: stats.extra.get(name, jnp.zeros((layers, *like.shape[1:]), like.dtype))
      for name, like in sums.items()
    }
    return dataclasses.replace(stats, extra=extra)

  both = jax.tree.map(lambda *a: jnp.concatenate(a), filled(stats), filled(own_stats))
  return losses, both, asked
