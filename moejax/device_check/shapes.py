"""Shapes of timed layers. Does not import jax, so that cores can be pinned before."""

import dataclasses

FACTOR = 1.25
"""Capacity factor of the variants that have one."""


@dataclasses.dataclass(frozen=True)
class Shape:
  """A layer: T tokens in one group, E experts of width F, K chosen."""

  name: str
  T: int
  D: int
  F: int
  E: int
  K: int
