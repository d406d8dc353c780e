"""The output of a model: logits, router statistics and a cache for generation.

Letters: B batch, S sequence, M tokens that a cache holds, V vocabulary, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.layers.cache import KeyValueCache, LayerCache
from moejax.layers.moe import MoEAux
from moejax.layers.routes import Routes
from moejax.routing.base import RouterStats
from moejax.types import pytree


@pytree
class Memory:
  """The cache of cross-attention for an encoder's output, for decoding."""

  layers: dict[str, dict[str, KeyValueCache]]
  """Keys and values for each decoder block; computed once."""
  segment_ids: Int[Array, "B M"]
  """Segments of the encoder's tokens; 0 is padding."""


@pytree
class Cache:
  """The cache of attention for the tokens so far, at most M of them."""

  layers: dict[str, dict[str, LayerCache]]
  segment_ids: Int[Array, "B M"]
  """-1 where the cache is empty."""
  index: Int[Array, ""]
  """Number of tokens written."""
  memory: Memory | None = None
  """The encoder's, if there is one."""

  def longer(self, count: int) -> "Cache":
    """Returns the cache with room for `count` more tokens."""

    def pad(leaf: Array) -> Array:
      before = [(0, 0)] * (leaf.ndim - 2)
      return jnp.pad(leaf, [*before, (0, count), (0, 0)])

    empty = jnp.pad(self.segment_ids, ((0, 0), (0, count)), constant_values=-1)
    layers = jax.tree.map(pad, self.layers)
    return dataclasses.replace(self, layers=layers, segment_ids=empty)


@pytree
class DecoderOutput:
  """The output of one call."""

  logits: Float[Array, "B S V"]
  """float32."""
  aux: dict[str, Float[Array, ""]]
  """Aux terms by name: sum over MoE layers and groups of value * valid tokens.

  Divided by the batch's valid tokens, this is the sum over layers of the term's mean.
  """
  stats: RouterStats | None
  """Router statistics, with a leading axis of MoE layers in order; None without any."""
  cache: Cache | None
  served: Bool[Array, "L B S E"] | None = None
  """Which experts computed each token; L counts MoE layers; only on request."""
  routes: Routes | None = None
  """The routers' decisions for each token, with a leading axis of MoE layers; only on
  request."""
  encoder_routes: Routes | None = None
  """The same for an encoder, which reads other tokens."""


def collect(
  auxes: list[MoEAux],
) -> tuple[dict[str, Float[Array, ""]], RouterStats | None, dict[str, Any]]:
  """Concatenates the MoE layers of all parts in order and sums their losses.

  Returns:
    Losses, statistics, and the fields of `DecoderOutput` that are returned on request.
  """
  if not auxes:
    return {}, None, {}
  joined = jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)
  losses = {name: jnp.sum(value) for name, value in joined.losses.items()}
  return losses, joined.stats, {"served": joined.served, "routes": joined.routes}
