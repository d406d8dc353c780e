"""Fused attention on TPU: at most one block of scores in memory.

jax's splash attention (a Pallas kernel that ships with jax) under `jax.shard_map`, since
the compiler cannot shard a kernel: sequences over the token axes, heads over `tensor`.
Elsewhere `jax.nn.dot_product_attention` is used; see `layers/attention`.

Letters: B batch, S sequence, H query heads, J key/value heads, A query and key head
width, Z value head width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from moejax.sharding.mesh import TOKEN_AXES, mesh_in_scope, shard_map

LANES = 128
_LARGEST_BLOCK = 512
"""The scores of a 512 x 512 block and their operands fit in on-chip memory."""


def block_size(sequence_length: int) -> int | None:
  """Returns the side of a block of scores; None if no block divides the sequence."""
  sizes = (s for s in (_LARGEST_BLOCK, 256, LANES) if sequence_length % s == 0)
  return next(sizes, None)


def tpu_attention(
  query: Float[Array, "B S H A"],
  key: Float[Array, "B S J A"],
  value: Float[Array, "B S J Z"],
  segment_ids: Int[Array, "B S"],
  sinks: Float[Array, "H"] | None = None,
  *,
  window: int = 0,
  scale: float | None = None,
  interpret: bool = False,
) -> Float[Array, "B S H Z"]:
  """Computes causal attention within each segment.

  Args:
    query: after rotary embedding.
    key: each serves H/J query heads.
    value: like key.
    segment_ids: segment of each token; padding is its own segment.
    sinks: a logit per head that takes part in the softmax and has no value.
    window: tokens a query sees, including its own; 0 means all before it.
    scale: multiplies the logits; None means 1/sqrt(A).
    interpret: runs the kernel without a TPU, slowly, for tests.
  """

  def local(query: Array, key: Array, value: Array, ids: Array, *sinks: Array) -> Array:
    kernel = _kernel(query.shape[2], query.shape[1], window, interpret)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scaled = query * jnp.asarray(factor, query.dtype)
    q, k, v = (a.swapaxes(1, 2) for a in (scaled, key, value))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, _segments(ids), *sinks))(
        q, k, v, ids
      )
    return out.swapaxes(1, 2)

  args = (query, key, value, segment_ids, *([] if sinks is None else [sinks]))
  if mesh_in_scope() is None:
    return local(*args)
  heads = PartitionSpec(TOKEN_AXES, None, "tensor")
  specs = (heads, heads, heads, PartitionSpec(TOKEN_AXES), PartitionSpec("tensor"))
  # The kernel does not declare over which axes its results vary; everything here is
  # sharded the same way over all of them, so the check would find nothing.
  return shard_map(local, in_specs=specs[: len(args)], out_specs=heads, check_vma=False)(
    *args
  )


def _segments(ids: Int[Array, "S"]) -> Any:
  from jax.experimental.pallas.ops.tpu import splash_attention

  return splash_attention.SegmentIds(q=ids, kv=ids)


def _kernel(heads: int, length: int, window: int, interpret: bool) -> Any:
  # Imported late: importing Pallas for TPUs takes a second, which CPU runs should avoid.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  block = block_size(length)
  assert block is not None, length
  sizes = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  shape = (length, length)
  seen = (
    splash.LocalMask(shape, (window - 1, 0), offset=0)
    if window
    else splash.CausalMask(shape)
  )
  return splash.make_splash_mha_single_device(
    splash.MultiHeadMask([seen] * heads), block_sizes=sizes, interpret=interpret
  )
