"""SplitMix64 (Steele et al., OOPSLA 2014): numbers stable across numpy versions."""

import numpy as np
from jaxtyping import UInt64

GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""Increment of the state per draw."""


def finalise(x: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
  """Returns the output for a state."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
