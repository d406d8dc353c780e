"""Dispatch by dense weights, as in GShard and Switch: `--config.moe.dispatcher=einsum`.

A [T, E, C] mask multiplies tokens into their slots, and the combine weights multiply
them out again. The cost grows with T*E*C, but this is the most readable layout, and the
only one for routers that mix tokens (Soft MoE).

Letters: G groups, T tokens of a group, D width, E experts, C slots per expert.
Source: GShard, arXiv:2006.16668, algorithm 2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import parts
from moejax.dispatch.base import SlotLayout
from moejax.routing.placement import Placement
from moejax.types import pytree


@pytree
class Mix(SlotLayout):
  """Dense weights between tokens and slots. Dropless has C = T."""

  dispatch: Float[Array, "G T E C"]
  """Weight of each token in each slot."""
  combine: Float[Array, "G T E C"]
  """Weight of each slot in each token."""

  @classmethod
  def of(cls, placement: Placement) -> "Mix":
    return cls(
      dispatch=jax.vmap(lambda group: group.dispatch_weights())(placement),
      combine=jax.vmap(lambda group: group.combine_weights())(placement),
    )

  def to_experts(self, x: Float[Array, "G T D"]) -> Float[Array, "E G C D"]:
    return jnp.einsum("gtec,gtd->egcd", self.dispatch.astype(x.dtype), x)

  @parts.of_part(parts.COMBINE)
  def from_experts(self, rows: Float[Array, "E G C D"]) -> Float[Array, "G T D"]:
    return jnp.einsum("gtec,egcd->gtd", self.combine.astype(rows.dtype), rows)
