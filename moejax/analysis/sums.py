"""Sums of batches, on the host and wide enough for any text."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np


def add(
  total: dict[str, Any], sums: Mapping[str, Any], *, counts: Collection[str] = ()
) -> None:
  """Adds a batch's sums to the total, in place, in float64 and int64.

  Args:
    total: arrays of the host by name; empty at first.
    sums: arrays of the devices, which are waited for.
    counts: names of floats that are whole numbers, and become integers.
  """
  for name, value in jax.device_get(dict(sums)).items():
    value = np.asarray(np.rint(value) if name in counts else value)
    is_float = np.issubdtype(value.dtype, np.floating) and name not in counts
    value = value.astype(np.float64 if is_float else np.int64)
    total[name] = total[name] + value if name in total else value
