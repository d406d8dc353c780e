"""Causal self-attention: multi-head or grouped-query, RoPE, windows, packing, cache.

Letters: B batch, S new tokens, M tokens that can be attended to (S, or the
cache's length), D width, H query heads, J key/value heads, A head width.
Sources: RoPE, arXiv:2104.09864 (halves rotated, as in Llama); grouped queries,
arXiv:2305.13245; QK-norm, arXiv:2302.05442; windows, Mistral, arXiv:2310.06825.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moejax.config import ModelConfig
from moejax.layers import parameter
from moejax.layers.norm import RMSNorm
from moejax.layers.tpu_attention import block_size, tpu_attention
from moejax.platform import target_is_nvidia, target_platform
from moejax.types import pytree


@pytree
class LayerCache:
  """Keys and values of one layer (or, stacked, of L layers)."""

  key: Float[Array, "*l B M J A"]
  value: Float[Array, "*l B M J A"]


@pytree
class Context:
  """What every attention layer of one call shares."""

  positions: Int[Array, "B S"]
  """Positions of the new tokens within their document."""
  mask: Bool[Array, "B 1 S M"]
  """Whether a query may attend to a key."""
  segment_ids: Int[Array, "B S"]
  """Segments of the new tokens, for kernels that build their own mask."""
  index: Int[Array, ""] | None = None
  """Index of the first new token in the cache; None without a cache."""


def attention_mask(
  query_segment: Int[Array, "B S"],
  key_segment: Int[Array, "B M"],
  *,
  offset: Int[Array, ""] | int = 0,
  window: int = 0,
) -> Bool[Array, "B 1 S M"]:
  """Returns a causal mask within segments, limited to `window` tokens (0 means all).

  Padding (segment 0) attends to padding: a row with nothing to attend to would
  attend uniformly to everything, with a gradient.

  Args:
    query_segment: segment of each new token.
    key_segment: segment of each key; -1 where the cache is empty.
    offset: index of the first query among the keys.
    window: 0, or the number of visible tokens, including the query's own.
  """
  num_queries, num_keys = query_segment.shape[1], key_segment.shape[1]
  query = jnp.arange(num_queries, dtype=jnp.int32)[:, None] + offset
  key = jnp.arange(num_keys, dtype=jnp.int32)[None, :]
  seen = key <= query
  if window:
    seen &= key > query - window
  same = query_segment[:, None, :, None] == key_segment[:, None, None, :]
  return same & seen[None, None]


def rotary(
  x: Float[Array, "B S H A"], positions: Int[Array, "B S"], theta: float
) -> Float[Array, "B S H A"]:
  """Applies rotary position embedding; angles and rotation in float32."""
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _implementation(dtype: jnp.dtype) -> Literal["cudnn"] | None:
  """Returns "cudnn" (fused attention) for half precision on an NVIDIA GPU, else None."""
  half = dtype in (jnp.bfloat16, jnp.float16)
  return "cudnn" if half and target_is_nvidia() else None


class Attention(nnx.Module):
  """Projections around `jax.nn.dot_product_attention`."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    width, heads = config.width, config.num_heads
    kv_heads = config.num_kv_heads or heads
    size = config.head_dim or width // heads
    out_scale = config.init_scale / (2 * config.num_layers) ** 0.5
    dtype = config.param_dtype

    def projection(count: int, axis: str) -> nnx.Param:
      return parameter.matrix(
        rngs,
        (width, count, size),
        ("width", axis, "head_dim"),
        fan_in=width,
        scale=config.init_scale,
        dtype=dtype,
      )

    self.query = projection(heads, "heads")
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
    if config.qk_norm:
      self.query_norm = RMSNorm(size, epsilon=config.norm_eps, axis="head_dim")
      self.key_norm = RMSNorm(size, epsilon=config.norm_eps, axis="head_dim")
    self.theta, self.window = config.rope_theta, config.sliding_window
    self.qk_norm = config.qk_norm

  def __call__(
    self, x: Float[Array, "B S D"], context: Context, cache: LayerCache | None
  ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
    query = _project(x, self.query, self.query_bias)
    key = _project(x, self.key, self.key_bias)
    value = _project(x, self.value, self.value_bias)
    if self.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    query = rotary(query, context.positions, self.theta)
    key = rotary(key, context.positions, self.theta)
    if cache is not None and context.index is not None:
      start = (0, context.index, 0, 0)
      cache = LayerCache(
        key=jax.lax.dynamic_update_slice(cache.key, key, start),
        value=jax.lax.dynamic_update_slice(cache.value, value, start),
      )
      key, value = cache.key, cache.value
    if cache is None and target_platform() == "tpu" and block_size(x.shape[1]):
      mixed = tpu_attention(query, key, value, context.segment_ids, window=self.window)
    else:
      # jax's attention mixes dtypes internally in bfloat16. (Its backward pass does so
      # during lowering, which this context does not cover: strict promotion and bfloat16
      # gradients are incompatible.)
      with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        mixed = jax.nn.dot_product_attention(
          query, key, value, mask=context.mask, implementation=_implementation(x.dtype)
        )
    out = jnp.einsum("bsha,had->bsd", mixed, self.out[...].astype(x.dtype))
    return out, cache


def _project(
  x: Float[Array, "B S D"], weight: nnx.Param, bias: nnx.Param | None
) -> Float[Array, "B S H A"]:
  y = jnp.einsum("bsd,dha->bsha", x, weight[...].astype(x.dtype))
  if bias is None:
    return y
  return y + bias[...].astype(x.dtype)[None, None]
