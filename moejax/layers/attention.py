"""Causal self-attention: multi-head or grouped-query, RoPE, windows, packing, cache.

Letters: B batch, S new tokens, M tokens that can be attended to (S, or the
cache's length), D width, H query heads, J key/value heads, A head width.
Sources: grouped queries, arXiv:2305.13245; QK-norm, arXiv:2302.05442, over the full
width in OLMoE, arXiv:2409.02060, section 4.2.5; clipping, DBRX (released code); windows,
Mistral, arXiv:2310.06825. Rotation and softmax are in `layers/rotary`, `layers/attend`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.config import ModelConfig
from moejax.config.attention import head_widths
from moejax.layers import parameter
from moejax.layers.attend import Context, attend
from moejax.layers.cache import KeyValueCache, LayerCache
from moejax.layers.norm import RMSNorm
from moejax.layers.rotary import logit_scale, make_rotary


class Attention(nnx.Module):
  """Projections around `layers/attend`."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    width, heads = config.width, config.num_heads
    kv_heads = config.num_kv_heads or heads
    size = head_widths(config).query
    out_scale = config.init_scale / (2 * config.num_layers) ** 0.5
    dtype = config.param_dtype

    def projection(count: int, axis: str, scale: float = 1.0) -> nnx.Param:
      return parameter.matrix(
        rngs,
        (width, count, size),
        ("width", axis, "head_dim"),
        fan_in=width,
        scale=config.init_scale * scale,
        dtype=dtype,
      )

    # T5 moves the scale of the logits into the queries' initial values.
    moved = config.positions == "relative" and config.attention_scale
    self.query = projection(
      heads, "heads", size**-0.5 / config.attention_scale if moved else 1.0
    )
    self.key = projection(kv_heads, "kv_heads")
    self.value = projection(kv_heads, "kv_heads")
    self.out = parameter.matrix(
      rngs,
      (heads, size, width),
      ("heads", "head_dim", "width"),
      fan_in=heads * size,
      scale=out_scale,
      dtype=dtype,
    )

    def bias(count: int, axis: str) -> nnx.Param | None:
      if not config.attention_bias:
        return None
      return parameter.constant(0.0, (count, size), (axis, "head_dim"), dtype=dtype)

    self.query_bias = bias(heads, "heads")
    self.key_bias = bias(kv_heads, "kv_heads")
    self.value_bias = bias(kv_heads, "kv_heads")
    self.out_bias = out_bias(config)
    self.sinks = sinks(config)
    by_head = config.qk_norm_scope == "head"
    if config.qk_norm:

      def norm(count: int, axis: str) -> RMSNorm:
        if by_head:
          return RMSNorm(size, epsilon=config.norm_eps, axis="head_dim")
        return RMSNorm(count * size, epsilon=config.norm_eps, axis=axis)

      self.query_norm, self.key_norm = norm(heads, "heads"), norm(kv_heads, "kv_heads")
    self.rotary = make_rotary(config) if config.positions == "rotary" else None
    self.scale = logit_scale(config)
    self.window, self.clip = config.sliding_window, config.clip_qkv
    self.qk_norm = config.qk_norm
    self.norm_width = config.qk_norm and not by_head

  def __call__(
    self, x: Float[Array, "B S D"], context: Context, cache: LayerCache | None
  ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
    query = self._queries(x)
    key, value = self._keys_and_values(x)
    if self.rotary is not None:
      limit = None if context.index is None else context.mask.shape[-1]
      query = self.rotary(query, context.positions, limit)
      key = self.rotary(key, context.positions, limit)
    if isinstance(cache, KeyValueCache) and context.index is not None:
      start = (0, 0, context.index, 0)
      key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
      cache = KeyValueCache(
        key=jax.lax.dynamic_update_slice(cache.key, key, start),
        value=jax.lax.dynamic_update_slice(cache.value, value, start),
      )
      key, value = cache.key.swapaxes(1, 2), cache.value.swapaxes(1, 2)
    return self._mix(query, key, value, context), cache

  def _queries(self, x: Float[Array, "B S D"]) -> Float[Array, "B S H A"]:
    query = _project(x, self.query, self.query_bias)
    if self.qk_norm:
      query = self._norm(self.query_norm, query)
    return query if self.clip is None else jnp.clip(query, -self.clip, self.clip)

  def _keys_and_values(
    self, x: Float[Array, "B M D"]
  ) -> tuple[Float[Array, "B M J A"], Float[Array, "B M J A"]]:
    key = _project(x, self.key, self.key_bias)
    value = _project(x, self.value, self.value_bias)
    if self.qk_norm:
      key = self._norm(self.key_norm, key)
    if self.clip is not None:
      key, value = (jnp.clip(a, -self.clip, self.clip) for a in (key, value))
    return key, value

  def _mix(
    self,
    query: Float[Array, "B S H A"],
    key: Float[Array, "B M J A"],
    value: Float[Array, "B M J A"],
    context: Context,
  ) -> Float[Array, "B S D"]:
    mixed = attend(
      *(query, key, value, context),
      window=self.window,
      scale=self.scale,
      sinks=None if self.sinks is None else self.sinks[...],
    )
    cached = context.index is not None
    return project_out(mixed, self.out, self.out_bias, cached=cached)

  def _norm(self, norm: RMSNorm, x: Float[Array, "B S H A"]) -> Float[Array, "B S H A"]:
    if not self.norm_width:
      return norm(x)
    return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


class CrossAttention(Attention):
  """Attention to the encoder's output, without positions (arXiv:1706.03762, 3.2.3)."""

  def __call__(
    self, x: Float[Array, "B S D"], context: Context, cache: LayerCache | None
  ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
    """Attends to the encoder's output, through the keys and values from `remember`.

    Args:
      x: activations of the decoder.
      context: its mask is between the decoder's tokens and the encoder's.
      cache: from `remember`; the same for every decoded token.
    """
    assert isinstance(cache, KeyValueCache)
    key, value = cache.key.swapaxes(1, 2), cache.value.swapaxes(1, 2)
    return self._mix(self._queries(x), key, value, context), cache

  def remember(self, memory: Float[Array, "B M D"]) -> KeyValueCache:
    """Returns keys and values of the encoder's output."""
    key, value = self._keys_and_values(memory)
    return KeyValueCache(key=key.swapaxes(1, 2), value=value.swapaxes(1, 2))


def out_bias(config: ModelConfig) -> nnx.Param | None:
  """Returns the bias of the output projection, if there is one."""
  if not config.attention_out_bias:
    return None
  return parameter.constant(0.0, (config.width,), ("norm",), dtype=config.param_dtype)


def sinks(config: ModelConfig) -> nnx.Param | None:
  """Returns one logit per head in float32, initially 0; None without sinks."""
  if not config.attention_sinks:
    return None
  return parameter.constant(0.0, (config.num_heads,), ("heads",))


def project_out(
  mixed: Float[Array, "B S H Z"],
  weight: nnx.Param,
  bias: nnx.Param | None,
  *,
  cached: bool = False,
) -> Float[Array, "B S D"]:
  """Returns the output projection of all heads."""
  matrix = weight[...].astype(mixed.dtype)
  if cached:
    # The einsum contracts (a, h), for which XLA:CPU transposes the weight. With few
    # tokens, that is more work than the product.
    matrix = matrix.reshape(-1, matrix.shape[-1])
    y = mixed.reshape(*mixed.shape[:2], -1) @ matrix
  else:
    y = jnp.einsum("bsha,had->bsd", mixed, matrix)
  return y if bias is None else y + bias[...].astype(y.dtype)[None, None]


def _project(
  x: Float[Array, "B S D"], weight: nnx.Param, bias: nnx.Param | None
) -> Float[Array, "B S H A"]:
  y = jnp.einsum("bsd,dha->bsha", x, weight[...].astype(x.dtype))
  if bias is None:
    return y
  return y + bias[...].astype(x.dtype)[None, None]
