"""The rows that a law is fitted to, and their grouping into settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moejax.errors import UserError
from moejax.sweep.laws.law import Floats, Law, Span

_SIZES = ("N", "D", "C", "E")
"""Letters that laws raise to a negative power or take the logarithm of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """A table of n runs."""

  inputs: Mapping[str, Floats]
  """[n] for each letter of the law."""
  measured: Floats
  """[n]: loss in nats per token, or another positive output."""
  point: NDArray[np.integer]
  """[n]: number of the row's setting, from 0; rows with equal inputs are one point."""
  compute: Floats | None
  """[n] training FLOPs, if known."""

  @classmethod
  def of(
    cls,
    law: type[Law],
    inputs: Mapping[str, ArrayLike],
    output: ArrayLike,
    compute: ArrayLike | None = None,
  ) -> "Rows":
    """Returns the checked columns; by default, `compute` is the law's C, or 6 N D.

    Raises:
      UserError: columns of different lengths, unknown letters, or unusable numbers.
    """
    measured = np.atleast_1d(np.asarray(output, np.float64))
    if measured.ndim != 1 or not len(measured):
      raise UserError(f"{law.output}: one number per run, not shape {measured.shape}.")
    usable = np.isfinite(measured) & (measured > 0)
    if not np.all(usable):
      raise UserError(
        f"{law.output}={measured[~usable][0]:g}: it must be finite and above 0."
      )
    columns = law.checked(**inputs)
    for name, column in columns.items():
      if column.ndim and column.shape != measured.shape:
        raise UserError(f"{name} has {column.shape} values for {len(measured)} runs.")
      if np.any(column < 0):
        raise UserError(f"{name}={column.min():g}: it must not be negative.")
      if name in _SIZES and np.any(column == 0):
        raise UserError(f"{name}=0: it must be above 0. Leave out runs without steps.")
    columns = {k: np.broadcast_to(v, measured.shape) for k, v in columns.items()}
    table = np.stack(list(columns.values()), axis=1)
    point = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)
    if compute is not None:
      flops = np.broadcast_to(np.asarray(compute, np.float64), measured.shape)
    elif "C" in columns:
      flops = columns["C"]
    elif {"N", "D"} <= set(columns):
      flops = 6 * columns["N"] * columns["D"]
    else:
      flops = None
    return cls(inputs=columns, measured=measured, point=point, compute=flops)

  @property
  def num_points(self) -> int:
    """Number of distinct settings; rows keep the numbers of the whole table."""
    return len(np.unique(self.point))

  @property
  def ranges(self) -> dict[str, Span]:
    """Least and greatest value of each input."""
    return {k: (float(v.min()), float(v.max())) for k, v in self.inputs.items()}

  def take(self, index: NDArray[Any]) -> "Rows":
    """Returns some rows, by a mask or by numbers that may repeat."""
    return Rows(
      inputs={name: column[index] for name, column in self.inputs.items()},
      measured=self.measured[index],
      point=self.point[index],
      compute=None if self.compute is None else self.compute[index],
    )
