"""Softmax attention on given queries, keys and values, by the best available kernel.

The kernel for each case, and why not another:

  TPU, no cache, a causal sequence of whole
  blocks, no bias                              splash attention, `layers/tpu_attention`
  NVIDIA GPU, half precision, no sinks or bias cuDNN, through jax; it has no sinks, and
                                               limits the width of a head
  sinks, or values of another width than keys  `plain_attention` below
  everything else                              `jax.nn.dot_product_attention`

Letters: B batch, S new tokens, M tokens that can be attended to, H query heads, J
key/value heads, A query and key head width, Z value head width.
Sources: grouped queries, arXiv:2305.13245; sinks, arXiv:2309.17453, as logits without a
key in GPT-OSS (released code).
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import ModelConfig
from moejax.layers.tpu_attention import block_size, tpu_attention
from moejax.platform import target_is_nvidia, target_platform
from moejax.types import pytree, static_field


@pytree
class Context:
  """Inputs shared by all attention layers of one call."""

  positions: Int[Array, "B S"]
  """Positions of the new tokens within their document."""
  mask: Bool[Array, "B 1 S M"]
  """Whether a query may attend to a key, in the called layer."""
  segment_ids: Int[Array, "B S"]
  """Segments of the new tokens, for kernels that build their own mask."""
  index: Int[Array, ""] | None = None
  """Index of the first new token in the cache; None without a cache."""
  window_mask: Bool[Array, "B 1 S M"] | None = None
  """The mask of layers with a window, if only some layers have one."""
  windowed: Bool[Array, ""] | None = None
  """Whether the called layer has the window, if only some layers do."""
  bias: Float[Array, "1 H S M"] | None = None
  """Added to the logits (relative positions)."""
  is_causal: bool = static_field(default=True)
  """Whether the mask is that of a causal sequence, for kernels that build their own."""

  def of_layer(self, windowed: Bool[Array, ""]) -> "Context":
    """Returns the context of a layer with or without the window."""
    assert self.window_mask is not None
    mask = jnp.where(windowed, self.window_mask, self.mask)
    return dataclasses.replace(self, mask=mask, window_mask=None, windowed=windowed)


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


def attention_masks(
  config: ModelConfig,
  query_segment: Int[Array, "B S"],
  key_segment: Int[Array, "B M"],
  *,
  offset: Int[Array, ""] | int = 0,
) -> dict[str, Any]:
  """Returns the masks of a `Context`; arguments as in `attention_mask`.

  Under a window pattern, a scanned layer chooses one of two masks.
  """
  make = functools.partial(attention_mask, query_segment, key_segment, offset=offset)
  if not config.window_pattern:
    return {"mask": make(window=config.sliding_window)}
  return {"mask": make(), "window_mask": make(window=config.sliding_window)}


def attend_to_all(
  query_segment: Int[Array, "B S"], key_segment: Int[Array, "B M"]
) -> Bool[Array, "B 1 S M"]:
  """Returns a mask within segments in both directions: encoders and cross-attention.

  Padding attends to everything: a row with nothing to attend to could become NaN in some
  kernels.
  """
  query, key = query_segment[:, None, :, None], key_segment[:, None, None, :]
  return (query == key) | (query <= 0)


def attend(
  query: Float[Array, "B S H A"],
  key: Float[Array, "B M J A"],
  value: Float[Array, "B M J Z"],
  context: Context,
  *,
  window: int = 0,
  scale: float | None = None,
  sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B S H Z"]:
  """Mixes the values of the tokens that each query may attend to.

  Args:
    query: after rotation.
    key: after rotation; each head serves H/J query heads.
    value: like key.
    context: its mask already includes the window.
    window: of this layer, or of the layers that have one, for kernels that build their
      own mask.
    scale: multiplies the logits; None means 1/sqrt(A).
    sinks: a logit per head that takes part in the softmax and has no value.
  """
  uncached = context.index is None
  is_plain = uncached and context.is_causal and context.bias is None
  if is_plain and target_platform() == "tpu" and block_size(query.shape[1]):
    kernel = functools.partial(tpu_attention, scale=scale)
    args = (query, key, value, context.segment_ids, sinks)
    if context.windowed is None:
      return kernel(*args, window=window)
    inside = functools.partial(kernel, window=window)
    return jax.lax.cond(context.windowed, inside, kernel, *args)
  implementation = None
  if context.bias is None:
    implementation = _implementation(query.dtype, query.shape[-1])
  width = value.shape[-1]
  fused = implementation == "cudnn"
  # jax's unfused form would transpose the whole cache.
  if sinks is None and (fused or (uncached and width == query.shape[-1])):
    # jax requires values as wide as keys; the zeros added here stay zeros in the result.
    missing = query.shape[-1] - width
    if missing:
      value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, missing)))
    # jax's attention mixes dtypes internally in bfloat16. (Its backward pass does so
    # during lowering, which this context does not cover: strict promotion and bfloat16
    # gradients are incompatible.)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      mixed = jax.nn.dot_product_attention(
        *(query, key, value, context.bias),
        mask=context.mask,
        scale=scale,
        implementation=implementation,
      )
    return mixed[..., :width] if missing else mixed
  if scale is None:
    scale = float(query.shape[-1] ** -0.5)
  return plain_attention(
    *(query, key, value, context.mask), scale=scale, sinks=sinks, bias=context.bias
  )


def plain_attention(
  query: Float[Array, "B S H A"],
  key: Float[Array, "B M J A"],
  value: Float[Array, "B M J Z"],
  mask: Bool[Array, "B 1 S M"],
  *,
  scale: float,
  sinks: Float[Array, "H"] | None,
  bias: Float[Array, "1 H S M"] | None = None,
) -> Float[Array, "B S H Z"]:
  """Computes attention with all logits in memory; softmax in float32.

  With sinks, a query's weights over the tokens sum to less than 1: the sink takes the
  rest. Arguments as in `attend`.
  """
  batch, length, heads, width = query.shape
  kv_heads = key.shape[2]
  grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)
  logits = jnp.einsum(
    "bsjga,bmja->bjgsm", grouped, key, preferred_element_type=jnp.float32
  )
  logits = logits * scale
  if bias is not None:
    bias = bias.astype(jnp.float32).reshape(1, kv_heads, -1, *bias.shape[2:])
    logits = logits + bias
  hidden = jnp.finfo(jnp.float32).min
  logits = jnp.where(mask[:, :, None], logits, hidden)
  largest = jnp.max(logits, axis=-1, keepdims=True)
  sink = None
  if sinks is not None:
    sink = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
    largest = jnp.maximum(largest, sink)
  largest = jax.lax.stop_gradient(largest)
  weights = jnp.exp(logits - largest)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  if sink is not None:
    total = total + jnp.exp(sink - largest)
  weights = (weights / total).astype(value.dtype)
  # Not an einsum: it would swap the operands, and transpose all values of a cache.
  rows = weights.reshape(batch, kv_heads, -1, key.shape[1])
  mixed = rows @ value.swapaxes(1, 2)
  mixed = mixed.reshape(batch, heads, length, value.shape[-1])
  return mixed.swapaxes(1, 2)


def _implementation(dtype: jnp.dtype, width: int) -> Literal["cudnn"] | None:
  """Returns "cudnn" (fused attention) where an NVIDIA GPU has it, else None.

  cuDNN supports half precision, and head widths that are multiples of 8: up to 256 on
  Hopper and later, up to 128 before.
  """
  if dtype not in (jnp.bfloat16, jnp.float16) or not target_is_nvidia():
    return None
  capability = getattr(jax.devices()[0], "compute_capability", None) or "0"
  limit = 256 if float(capability) >= 9 else 128
  return "cudnn" if width % 8 == 0 and width <= limit else None
