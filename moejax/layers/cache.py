"""Caches for decoding: what a layer needs of earlier tokens.

Letters: B batch, M tokens that a cache holds, J key/value heads, A head width, X rank of
the latent vector plus the width of the shared rotated key.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import ModelConfig
from moejax.config.attention import head_widths
from moejax.types import pytree


@pytree
class KeyValueCache:
  """Keys and values of one layer (or, stacked, of L layers).

  Heads come before tokens, the order in which attention's products read them. With tokens
  first, XLA:CPU transposes the whole cache in every step.
  """

  key: Float[Array, "*l B J M A"]
  value: Float[Array, "*l B J M A"]


@pytree
class LatentCache:
  """The cache of latent attention for one layer (or, stacked, for L layers)."""

  latent: Float[Array, "*l B M X"]
  """The normalised latent vector, then the rotated key that all heads share."""


LayerCache = KeyValueCache | LatentCache


def empty_cache(config: ModelConfig, batch: int, length: int, *stack: int) -> LayerCache:
  """Returns zeros for `length` tokens, with leading axes `stack`."""
  if config.attention == "latent":
    width = config.kv_rank + config.rope_head_dim
    return LatentCache(latent=jnp.zeros((*stack, batch, length, width), config.dtype))
  heads = config.num_kv_heads or config.num_heads
  shape = (*stack, batch, heads, length, head_widths(config).query)
  zeros = jnp.zeros(shape, config.dtype)
  return KeyValueCache(key=zeros, value=zeros)
