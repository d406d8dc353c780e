"""A Transformer block: attention, then a dense or MoE feed-forward, with their norms.

The block of a decoder with an encoder attends to the encoder's output in between.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moejax import parts
from moejax.config import ModelConfig, MoEConfig
from moejax.config.router import num_selected
from moejax.layers.attend import Context
from moejax.layers.attention import Attention, CrossAttention
from moejax.layers.cache import KeyValueCache, LayerCache
from moejax.layers.feed_forward import FeedForward
from moejax.layers.latent_attention import LatentAttention
from moejax.layers.moe import LayerInputs, MoE, MoEAux
from moejax.layers.norm import RMSNorm
from moejax.sharding.mesh import on_tokens
from moejax.types import pytree, static_field


@pytree
class CallOptions:
  """Options of one call of the model, static at trace time."""

  train: bool = static_field()
  capacity_factor: float | None = static_field()
  return_served: bool = static_field(default=False)
  return_routes: bool = static_field(default=False)


@pytree
class BlockInputs:
  """Inputs shared by all blocks of one call."""

  context: Context
  valid: Bool[Array, "B S"]
  token_ids: Int[Array, "B S"]
  assigned: Int[Array, "B S K"] | None
  """The experts of each token, if given by a table (hash routing)."""
  step: Int[Array, ""] | None
  """Optimizer steps taken, in training."""
  memory: Float[Array, "B M D"] | None = None
  """The encoder's output; None without an encoder, or if keys and values of it are
  cached."""
  cross: Context | None = None
  """Masks between the decoder's tokens and the encoder's."""
  options: CallOptions = static_field()

  def of_layer(self, windowed: Bool[Array, ""] | None) -> "BlockInputs":
    """Returns the inputs of a layer with or without the window; unchanged for None."""
    if windowed is None:
      return self
    return dataclasses.replace(self, context=self.context.of_layer(windowed))


class Block(nnx.Module):
  """x + attention(norm(x)), then x + feed_forward(norm(x)).

  Under `norm_placement` post, the norm is applied to what is added, x +
  norm(attention(x)); under both, it is applied before and after.
  """

  def __init__(
    self,
    model: ModelConfig,
    moe: MoEConfig,
    is_moe: bool,
    rngs: nnx.Rngs,
    *,
    cross: bool = False,
  ):
    """Creates a block; `cross` adds attention to an encoder's output."""

    def norm(*placements: str) -> RMSNorm | None:
      if model.norm_placement not in placements:
        return None
      return RMSNorm(model.width, epsilon=model.norm_eps)

    self.attention_norm = norm("pre", "both")
    self.attention = make_attention(model, rngs)
    self.attention_post_norm = norm("post", "both")
    if cross:
      self.cross_attention_norm = norm("pre", "both")
      self.cross_attention = CrossAttention(model, rngs)
      self.cross_attention_post_norm = norm("post", "both")
    self.has_cross = cross
    self.feed_forward_norm = norm("pre", "both")
    self.feed_forward_post_norm = norm("post", "both")
    self.residual_scale = model.residual_scale
    if is_moe and not moe.dense_twin:
      self.moe = MoE(model, moe, rngs)
    else:
      hidden, activation = model.hidden, model.activation
      if is_moe:
        hidden, activation = twin_hidden(moe), moe.activation or activation
      self.feed_forward = FeedForward(model, hidden, rngs, activation)
    self.is_moe = is_moe and not moe.dense_twin
    self.has_second = is_moe and moe.dense_after
    if self.has_second:
      self.second_norm = norm("pre", "both")
      self.second = FeedForward(model, model.hidden, rngs, model.activation)
      self.second_post_norm = norm("post", "both")

  def __call__(
    self,
    x: Float[Array, "B S D"],
    inputs: BlockInputs,
    *,
    key: Key[Array, ""] | None,
    cache: LayerCache | None,
    layer: LayerInputs | None = None,
    remembered: KeyValueCache | None = None,
  ) -> tuple[Float[Array, "B S D"], MoEAux | None, LayerCache | None]:
    """Returns the block's output, its MoE layer's aux, and the extended cache.

    Args:
      x: the block's input.
      inputs: shared by all blocks.
      key: randomness of this block.
      cache: of self-attention.
      layer: inputs of its MoE layer.
      remembered: keys and values of the encoder's output; None computes them.
    """
    x, cache = self.attend(x, inputs, cache=cache, remembered=remembered)
    x, aux = self.feed(x, inputs, key=key, layer=layer)
    return x, aux, cache

  def attend(
    self,
    x: Float[Array, "B S D"],
    inputs: BlockInputs,
    *,
    cache: LayerCache | None = None,
    remembered: KeyValueCache | None = None,
  ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
    """Runs the first half of the block, attention; arguments as in a call."""
    normed = _apply(self.attention_norm, x)
    with parts.scope(parts.ATTENTION):
      mixed, cache = self.attention(normed, inputs.context, cache)
    x = self._add(x, _apply(self.attention_post_norm, mixed))
    if self.has_cross:
      x = self._add(x, self._cross(x, inputs, remembered))
    return x, cache

  def feed(
    self,
    x: Float[Array, "B S D"],
    inputs: BlockInputs,
    *,
    key: Key[Array, ""] | None = None,
    layer: LayerInputs | None = None,
  ) -> tuple[Float[Array, "B S D"], MoEAux | None]:
    """Runs the second half of the block, the feed-forward; arguments as in a call."""
    normed = self.normed(x)
    if not self.is_moe:
      with parts.scope(parts.FEED_FORWARD):
        y = self.feed_forward(normed)
      y = _apply(self.feed_forward_post_norm, y)
      return self._second(self._add(x, y)), None
    options = inputs.options
    y, aux = self.moe(
      normed,
      inputs.valid,
      inputs.token_ids,
      inputs.assigned,
      layer,
      key=key,
      train=options.train,
      capacity_factor=options.capacity_factor,
      positions=inputs.context.positions,
      step=inputs.step,
      return_served=options.return_served,
      return_routes=options.return_routes,
    )
    x = self._add(x, _apply(self.feed_forward_post_norm, y))
    return self._second(x), aux

  def normed(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """Returns the feed-forward's input, from the output of the first half."""
    return _apply(self.feed_forward_norm, x)

  def _second(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """Adds the dense feed-forward after an MoE layer, if there is one."""
    if not self.has_second:
      return x
    normed = _apply(self.second_norm, x)
    with parts.scope(parts.FEED_FORWARD):
      y = self.second(normed)
    return self._add(x, _apply(self.second_post_norm, y))

  @parts.of_part(parts.ATTENTION)
  def _cross(
    self, x: Float[Array, "B S D"], inputs: BlockInputs, cache: KeyValueCache | None
  ) -> Float[Array, "B S D"]:
    assert inputs.cross is not None
    if cache is None:
      assert inputs.memory is not None
      cache = self.cross_attention.remember(inputs.memory)
    normed = _apply(self.cross_attention_norm, x)
    mixed, _ = self.cross_attention(normed, inputs.cross, cache)
    return _apply(self.cross_attention_post_norm, mixed)

  @parts.of_part(parts.NORM)
  def _add(
    self, x: Float[Array, "B S D"], y: Float[Array, "B S D"]
  ) -> Float[Array, "B S D"]:
    if self.residual_scale != 1:
      y = y * jnp.asarray(self.residual_scale, y.dtype)
    return on_tokens(x + y)


@parts.of_part(parts.NORM)
def _apply(norm: RMSNorm | None, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
  return x if norm is None else norm(x)


def make_attention(model: ModelConfig, rngs: nnx.Rngs) -> Attention | LatentAttention:
  """Returns the attention layer named by `model.attention`."""
  kind = LatentAttention if model.attention == "latent" else Attention
  return kind(model, rngs)


def twin_hidden(moe: MoEConfig) -> int:
  """Returns the width of a dense layer with an MoE layer's active FLOPs: K*F + shared."""
  return num_selected(moe) * moe.fine_hidden + moe.shared_width
