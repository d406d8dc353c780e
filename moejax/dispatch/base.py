"""Layouts: how one device brings tokens to its experts, and results back.

A layout is made from a placement of any router. `to_experts` turns tokens into rows that
experts can compute, `from_experts` adds up each token's weighted results, and `run` does
all of it on one device. Between the two, an exchange (`moejax.exchange`) may
carry the rows to other devices. All layouts give the same values and gradients; they
differ in memory and speed.

Letters: G groups, T tokens of a group, D width, E experts, C slots per expert and group.
"""

import abc

from jaxtyping import Array, Float

from moejax.experts.weights import ExpertWeights, apply_experts
from moejax.routing.placement import Placement


class Layout(abc.ABC):
  """The rows of a placement, in one layout."""

  @classmethod
  @abc.abstractmethod
  def of(cls, placement: Placement) -> "Layout":
    """Returns the layout of G groups."""

  @abc.abstractmethod
  def run(
    self,
    x: Float[Array, "G T D"],
    weights: ExpertWeights,
    *,
    activation: str,
    chunks: int = 1,
  ) -> Float[Array, "G T D"]:
    """Returns the sum over kept assignments of gate * expert(token), in x's dtype.

    Args:
      x: tokens of all groups.
      weights: of the experts, which are all on this device.
      activation: of the experts.
      chunks: parts that are computed one after the other, to save memory; a layout
        whose experts compute all rows at once ignores it.
    """


class SlotLayout(Layout):
  """A layout whose rows have a size that does not depend on the load.

  One all-to-all of known shape can therefore carry them. No token collects an empty slot,
  so empty slots need no mask, but they cost as much as full ones.
  """

  @classmethod
  @abc.abstractmethod
  def of(cls, placement: Placement) -> "SlotLayout":
    """Returns the layout of G groups."""

  @abc.abstractmethod
  def to_experts(self, x: Float[Array, "G T D"]) -> Float[Array, "E G C D"]:
    """Returns the experts' inputs, zero where a slot is empty."""

  @abc.abstractmethod
  def from_experts(self, rows: Float[Array, "E G C D"]) -> Float[Array, "G T D"]:
    """Returns each token's weighted sum of outputs."""

  def gates(self) -> Float[Array, "E G C"] | None:
    """Returns the gate of each slot, to travel with it; None where tokens share slots."""
    return None

  def add_up(self, rows: Float[Array, "E G C D"]) -> Float[Array, "G T D"]:
    """Returns each token's sum of outputs, which are already weighted by `gates`."""
    raise NotImplementedError(f"{type(self).__name__} has no gates to weight by")

  def run(
    self,
    x: Float[Array, "G T D"],
    weights: ExpertWeights,
    *,
    activation: str,
    chunks: int = 1,
  ) -> Float[Array, "G T D"]:
    """Runs the experts in one batched matmul per matrix; see `Layout.run`."""
    del chunks
    return self.from_experts(apply_experts(self.to_experts(x), weights, activation))
