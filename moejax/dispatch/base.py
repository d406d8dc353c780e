"""Dispatch: how tokens reach their experts and come back.

A dispatcher takes tokens, a `Routing` and the experts' weights, and returns for
each token the gate-weighted sum of its experts' outputs. All dispatchers give
the same values and gradients; they differ in memory, speed and communication.

Letters: G groups, T tokens of a group, D width.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from moejax.experts.weights import ExpertWeights
from moejax.routing.base import Routing


@runtime_checkable
class Dispatcher(Protocol):
  """One way to run the experts on their tokens."""

  def __call__(
    self,
    x: Float[Array, "G T D"],
    routing: Routing,
    weights: ExpertWeights,
    *,
    activation: str,
  ) -> Float[Array, "G T D"]:
    """Returns the sum over kept assignments of gate * expert(token), in x's dtype."""
    ...
