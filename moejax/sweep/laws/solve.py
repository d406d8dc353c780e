"""Minimises the Huber loss of a law's log residuals over its free constants."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import optimize

from moejax.errors import UserError, did_you_mean
from moejax.sweep.laws.law import Floats, Law
from moejax.sweep.laws.rows import Rows

_FAR = 1e3
"""Residual for constants whose prediction is not a finite number above 0."""
_LOG_BOUND = 60.0
"""Bound of a constant that is fitted by its logarithm: e^-60 is 0 for any loss."""
_BOUND = 20.0
_STEP = 1e-30
_ROUGH = 40
"""Evaluations per start; only the best start is continued to the end."""
_PART = 0.3
"""Share in an undetermined direction above which a constant is named."""
_FLAT = 1e-6
"""Smallest singular value of the scaled Jacobian that counts, relative to the largest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """A law with some constants free; vectors hold the free ones, in their order."""

  law: Law
  """Has the fixed constants; the others are the published ones."""
  free: tuple[str, ...]
  delta: float
  published: bool
  """Whether the grid of starts includes the law's published constants."""

  @classmethod
  def of(
    cls,
    law: type[Law],
    fixed: Mapping[str, float],
    delta: float,
    settings: Mapping[str, Any],
    *,
    published: bool = True,
  ) -> "Problem":
    """Checks the fixed constants and `delta`.

    Raises:
      UserError: no such constant, all of them fixed, or delta not above 0.
    """
    names = law.constant_names()
    for name in fixed:
      if name not in names:
        remedy = did_you_mean(name, names)
        raise UserError(f"fixed: {law.__name__} has no constant {name}. {remedy}")
    free = tuple(name for name in names if name not in fixed)
    if not free:
      raise UserError(
        f"fixed: all constants of {law.__name__} are fixed; leave some free."
      )
    if not delta > 0:
      raise UserError(f"delta={delta:g}: the Huber loss needs a threshold above 0.")
    return cls(law=law(**fixed, **settings), free=free, delta=delta, published=published)

  @property
  def fixed_names(self) -> tuple[str, ...]:
    return tuple(n for n in self.law.constant_names() if n not in self.free)

  def constants_of(self, x: Any) -> dict[str, Any]:
    """Returns all constants, the free ones from a vector: real, complex or stacked."""
    values = dict(self.law.constants) | dict(zip(self.free, x))
    for name in self.law.positive & set(self.free):
      values[name] = np.exp(values[name])
    return values

  def law_of(self, x: Floats) -> Law:
    """Returns the law with the free constants of a vector."""
    constants = {name: float(value) for name, value in self.constants_of(x).items()}
    return dataclasses.replace(self.law, **constants)

  def vector(self, constants: Mapping[str, float]) -> Floats:
    """Returns the vector of some constants: logarithms of the positive ones."""
    tiny = np.exp(-_LOG_BOUND)
    return np.array(
      [
        np.log(max(constants[n], tiny)) if n in self.law.positive else constants[n]
        for n in self.free
      ]
    )

  def residuals(self, x: Any, rows: Rows) -> Any:
    """Returns log(predicted / measured) per row, complex if x is."""
    with np.errstate(all="ignore"):
      predicted = self.law.evaluate(self.constants_of(x), rows.inputs)
      values = np.log(predicted) - np.log(rows.measured)
      return np.where(np.isfinite(values), values, _FAR)

  def solve(
    self, rows: Rows, num_starts: int, also: Floats | None = None
  ) -> optimize.OptimizeResult:
    """Returns the best of several minimisations.

    Args:
      rows: what to fit.
      num_starts: how many of the grid's best points to start from.
      also: an additional start.
    """
    starts = self._starts()
    values = self.residuals(starts.T[:, :, None], rows)
    scaled = np.abs(values) / self.delta
    huber = np.where(scaled <= 1, scaled**2 / 2, scaled - 0.5).sum(axis=-1)
    best = starts[np.argsort(huber, kind="stable")[: max(num_starts, 1)]]
    best = [*best, *([] if also is None else [also])]
    rough = [self.polish(rows, x, _ROUGH) for x in best]
    return self.polish(rows, min(rough, key=lambda r: r.cost).x)

  def jacobian(self, x: Floats, rows: Rows) -> Floats:
    """Returns [rows, constants] derivatives, by a complex step: exact to rounding."""
    steps = x[:, None] + 1j * _STEP * np.eye(len(x))
    return self.residuals(steps[:, :, None], rows).imag.T / _STEP

  def polish(
    self, rows: Rows, start: Floats, max_steps: int = 300
  ) -> optimize.OptimizeResult:
    """Returns the minimum reached from one start."""
    bound = np.array(
      [_LOG_BOUND if n in self.law.positive else _BOUND for n in self.free]
    )
    # Any, since its type only allows the strings that it may also be.
    jacobian: Any = self.jacobian
    return optimize.least_squares(
      self.residuals,
      np.clip(start, -bound * 0.999, bound * 0.999),
      jac=jacobian,
      bounds=(-bound, bound),
      loss="huber",
      f_scale=self.delta,
      x_scale="jac",
      ftol=1e-10,
      xtol=1e-10,
      gtol=1e-12,
      max_nfev=max_steps,
      args=(rows,),
    )

  def weaknesses(self, solution: optimize.OptimizeResult) -> list[str]:
    """Returns sentences about constants that the rows do not determine."""
    scale = np.linalg.norm(solution.jac, axis=0)
    idle = [n for n, s in zip(self.free, scale) if s < _FLAT * scale.max()]
    values = self.constants_of(solution.x)
    notes = [f"{n} = {values[n]:.2g} has no effect on the fit: fix it" for n in idle]
    kept = scale >= _FLAT * scale.max()
    _, singular, right = np.linalg.svd(solution.jac[:, kept] / scale[kept])
    flat = right[singular < _FLAT * singular[0]]
    if len(flat):
      names = np.array(self.free)[kept][np.linalg.norm(flat, axis=0) > _PART]
      notes.append(f"the runs do not distinguish {', '.join(names)}: fix some")
    return notes

  def _starts(self) -> Floats:
    """Returns [starts, constants]: the product of the law's grid, and its constants."""
    published = self.law.constants
    grids = [self.law.starts.get(name, (published[name],)) for name in self.free]
    points = [dict(zip(self.free, point)) for point in itertools.product(*grids)]
    points += [published] if self.published else []
    return np.stack([self.vector(point) for point in points])
