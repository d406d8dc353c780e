"""A router's decisions for every token of a call, for analysis.

Returned on request (`CallOptions.return_routes`), since no training or evaluation needs
it. It is a returned value like every other statistic, so it works under scan, on a mesh
and for several routing groups.

Letters: B batch, S sequence, G routing groups, T tokens of a group, E experts, K choices
per token, C slots per expert and group, N assignments.
"""

import jax
from jaxtyping import Array, Bool, Float, Int

from moejax.routing.base import Routing
from moejax.routing.placement import Assignments
from moejax.types import pytree


@pytree
class Routes:
  """The decisions of one MoE layer, or of all with a leading axis of MoE layers."""

  logits: Float[Array, "*l B S E"]
  """float32, with the logit bias, if the router has one."""
  probs: Float[Array, "*l B S E"]
  """The router's probabilities."""
  served: Bool[Array, "*l B S E"]
  """Which experts computed each token."""
  expert: Int[Array, "*l B S K"] | None
  """Each token's experts, best first; None for a router whose tokens do not choose."""
  gate: Float[Array, "*l B S K"] | None
  """The weight of each choice: 0 where it was dropped."""
  kept: Bool[Array, "*l B S K"] | None
  """Whether the choice got a slot; False on padding."""


def routes_of(
  logits: Float[Array, "G T E"], routing: Routing, batch: int, length: int
) -> Routes:
  """Returns the routes of one layer, tokens back in their sequences.

  Args:
    logits: of the router.
    routing: of all groups.
    batch: B.
    length: S.
  """

  def back(x: Array) -> Array:
    return x.reshape(batch, length, -1)

  placement = routing.placement
  served = jax.vmap(lambda group: group.served())(placement)
  choices = {"expert": None, "gate": None, "kept": None}
  if isinstance(placement, Assignments) and placement.num_selected is not None:
    # Token-major: assignment n is choice n % K of token n // K.
    choices = {name: back(getattr(placement, name)) for name in choices}
  return Routes(
    logits=back(logits), probs=back(routing.probs), served=back(served), **choices
  )
