"""What a model gives: logits, what its routers did, and a cache to go on from.

Letters: B batch, S sequence, M tokens that a cache holds, V vocabulary, L layers.
"""

from jaxtyping import Array, Bool, Float, Int

from moejax.layers.attention import LayerCache
from moejax.routing.base import RouterStats
from moejax.types import pytree


@pytree
class Cache:
  """Keys and values of the tokens seen so far, at most M of them."""

  layers: dict[str, dict[str, LayerCache]]
  segment_ids: Int[Array, "B M"]
  """-1 where nothing was written yet."""
  index: Int[Array, ""]
  """Tokens written."""


@pytree
class DecoderOutput:
  """Of one call."""

  logits: Float[Array, "B S V"]
  """float32."""
  aux: dict[str, Float[Array, ""]]
  """Aux terms by name: sum over MoE layers and groups of value * valid tokens.

  Divided by the batch's valid tokens, it is the term's mean summed over layers.
  """
  stats: RouterStats | None
  """What the routers did, leading axis the MoE layers in order; None if none."""
  cache: Cache | None
  served: Bool[Array, "L B S E"] | None = None
  """Which experts computed each token, L the MoE layers; only where asked for."""
