"""Sums of batches, on the host, in types wide enough for any text."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np


def add(
  total: dict[str, Any], sums: Mapping[str, Any], *, counts: Collection[str] = ()
) -> None:
  """Adds a batch's sums to the total, in place, in float64 and int64.

  Args:
    total: arrays on the host by name; empty at first.
    sums: arrays on the devices; waits for them.
    counts: names of floats that are whole numbers, to be stored as integers.
  """
  for name, value in jax.device_get(dict(sums)).items():
    value = np.asarray(np.rint(value) if name in counts else value)
    is_float = np.issubdtype(value.dtype, np.floating) and name not in counts
    value = value.astype(np.float64 if is_float else np.int64)
    total[name] = total[name] + value if name in total else value
