"""Relative position bias: a learned number per head and bucket of distances.

It is added to the logits of self-attention, and one table serves all layers of a stack.
Half of the buckets are of single distances, the others of ranges that grow
logarithmically up to `relative_distance`, after which all distances share the last one.
A bidirectional stack has half of its buckets for keys after the query; a causal one sees
no such keys.

Letters: H heads, S queries, M keys, N buckets.
Source: T5, arXiv:1910.10683, section 2.1, and its released code.
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import ModelConfig
from moejax.layers import parameter


class RelativeBias(nnx.Module):
  """The table of a stack."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, bidirectional: bool):
    shape = (config.relative_buckets, config.num_heads)
    self.bias = parameter.matrix(rngs, shape, (None, "heads"), fan_in=config.width)
    self.furthest = config.relative_distance
    self.bidirectional = bidirectional

  def __call__(
    self, num_queries: int, num_keys: int, offset: Int[Array, ""] | int = 0
  ) -> Float[Array, "1 H S M"]:
    """Returns the bias in float32.

    Args:
      num_queries: S.
      num_keys: M.
      offset: index of the first query among the keys. Distances between indices are
        those between positions wherever a query may attend, within one segment.
    """
    query = jnp.arange(num_queries, dtype=jnp.int32)[:, None] + offset
    key = jnp.arange(num_keys, dtype=jnp.int32)[None, :]
    bucket = bucket_of(
      key - query,
      num_buckets=self.bias.shape[0],
      furthest=self.furthest,
      bidirectional=self.bidirectional,
    )
    table = self.bias[...].astype(jnp.float32)
    return jnp.moveaxis(table[bucket], -1, 0)[None]


def bucket_of(
  distance: Int[Array, "S M"], *, num_buckets: int, furthest: int, bidirectional: bool
) -> Int[Array, "S M"]:
  """Returns the bucket of each distance, key's index minus query's."""
  first = jnp.zeros_like(distance)
  if bidirectional:
    num_buckets //= 2
    first = jnp.where(distance > 0, num_buckets, 0)
    back = jnp.abs(distance)
  else:
    back = jnp.maximum(-distance, 0)
  # Looked up, since logarithms of float32 differ between platforms where they are whole.
  table = jnp.asarray(_buckets(num_buckets, furthest))
  return first + table[jnp.minimum(back, furthest)]


def _buckets(num_buckets: int, furthest: int) -> Int[np.ndarray, "n"]:
  """Returns the bucket of each distance from 0 to `furthest`, in one direction."""
  back = np.arange(furthest + 1)
  exact = num_buckets // 2
  share = np.log(np.maximum(back, exact) / exact) / math.log(furthest / exact)
  far = exact + np.floor(share * (num_buckets - exact) + 1e-9).astype(np.int64)
  return np.where(back < exact, back, np.minimum(far, num_buckets - 1)).astype(np.int32)
