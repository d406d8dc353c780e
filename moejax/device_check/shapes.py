"""Shapes of timed layers. Does not import jax, so that cores can be pinned first."""

import dataclasses

FACTOR = 1.25
"""Capacity factor of the variants with a capacity."""


@dataclasses.dataclass(frozen=True)
class Shape:
  """A layer: T tokens in one group, E experts of width F, K choices per token."""

  name: str
  T: int
  D: int
  F: int
  E: int
  K: int
