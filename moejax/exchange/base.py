"""The interface of an exchange: its inputs and outputs.

An exchange carries the rows of a layout to the devices that hold their experts, and back.
It runs inside one `jax.shard_map`, on the groups of its device.
`moejax.config.exchange_rule` defines which exchange can carry which layout.

Letters: G groups of this device, T tokens of a group, D width, E experts.
"""

import dataclasses
from typing import Protocol

from jaxtyping import Array, Float

from moejax.dispatch.base import Layout
from moejax.experts.weights import ExpertWeights
from moejax.routing.placement import Placement
from moejax.types import pytree

AXIS = "expert"
SAVED_NAME = "expert_exchange"
"""Name of values a remat policy saves, so that recomputation does not resend them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How experts are run and tokens are exchanged; see the flags of the same names."""

  activation: str
  num_selected: int
  """K of the config, which the rule of auto uses here and in the config check."""
  dispatcher: str = "auto"
  exchange: str = "auto"
  exchange_buffer: float | None = None
  """ragged: rows a device can receive, as a multiple of an even load; None fits any
  load. Excess rows are dropped and counted."""
  exchange_chunks: int = 1
  """all_to_all: pieces sent one by one, so that communication overlaps computation.
  ragged: parts of the groups sent and computed one after the other."""
  recomputed: bool = False
  """Whether the backward pass computes the experts again (`model.remat`). If so,
  all_to_all sends gates with the slots, so that the backward pass needs no outputs."""
  expert_chunks: int = 1
  """Number of parts into which sorted rows, and exchanged slots, are divided, to be
  computed one after the other."""


@pytree
class Lost:
  """Counts of what did not fit a bounded buffer; in a `shard_map`, one row per device."""

  assignments: Float[Array, "*p E"]
  """Lost assignments by expert."""
  tokens: Float[Array, "*p"]
  """Tokens that had kept assignments and lost all of them."""


class Exchange(Protocol):
  """One way to send tokens to their experts and back."""

  def __call__(
    self,
    x: Float[Array, "G T D"],
    placement: Placement,
    layout: type[Layout],
    weights: ExpertWeights,
    options: Options,
  ) -> tuple[Float[Array, "G T D"], Lost | None]:
    """Returns each token's gate-weighted sum of its experts' outputs.

    Args:
      x: tokens of this device's groups.
      placement: of the same groups, over all experts.
      layout: class of the layout that the experts of one device read.
      weights: of this device's experts.
      options: how tokens are exchanged.

    Returns:
      The sum, and what did not fit a bounded buffer (None if nothing is bounded).
    """
    ...


def none(
  x: Float[Array, "G T D"],
  placement: Placement,
  layout: type[Layout],
  weights: ExpertWeights,
  options: Options,
) -> tuple[Float[Array, "G T D"], None]:
  """Runs all experts on every device, without an exchange."""
  run = layout.of(placement).run
  return run(
    x, weights, activation=options.activation, chunks=options.expert_chunks
  ), None
