"""Dispatch by dense masks, as in GShard and Switch.

A [T, E, C] mask multiplies tokens into their slots, and the combine weights
multiply them out again. The cost grows with T*E*C, but this is the most readable
dispatcher and the easiest to shard: with tokens sharded over groups and experts
over a mesh axis, XLA turns the two einsums into two all-to-alls.

Letters: G groups, T tokens of a group, D width, E experts, C slots per expert.
Source: GShard, arXiv:2006.16668, algorithm 2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.experts.weights import ExpertWeights, apply_experts
from moejax.routing.base import Routing


def einsum(
  x: Float[Array, "G T D"],
  routing: Routing,
  weights: ExpertWeights,
  *,
  activation: str,
) -> Float[Array, "G T D"]:
  """Dispatches by dense masks and runs batched experts. Dropless uses C = T."""
  mask = jax.vmap(Routing.dispatch_weights)(routing).astype(x.dtype)
  combine = jax.vmap(Routing.combine_weights)(routing).astype(x.dtype)
  rows = jnp.einsum("gtec,gtd->egcd", mask, x)
  out = apply_experts(rows, weights, activation)
  return jnp.einsum("gtec,egcd->gtd", combine, out)
