"""The split of compute between parameters and tokens: Chinchilla's approaches 2 and 3.

Approach 2 (Hoffmann et al., arXiv:2203.15556, section 3.2): at each budget a parabola of
loss over log N has its minimum at N*; over budgets N* = k C^exponent. Approach 3
(section 3.3): fit L = e + a N^-alpha + b D^-beta to all runs; the split follows from it.

A minimum that the runs do not enclose is refused, not extrapolated.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from moejax.errors import UserError
from moejax.sweep.laws import fit as fit_lib
from moejax.sweep.laws import published as laws
from moejax.sweep.laws.law import Floats, Span

_SAME = 0.02
"""Budgets within this fraction of each other count as one."""
_PARABOLA = 3
"""Number of constants of a parabola."""
_CERTAIN = 0.95
"""Level at which a parabola's curvature must be above 0."""
_ENOUGH = 0.95
"""Fraction of bootstrap draws that must have a minimum at every budget."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Minimum:
  """The lowest loss at one budget, from a parabola."""

  budget: float
  """C, training FLOPs."""
  N: float
  loss: float
  curvature: float
  """Second derivative of the loss in ln N."""
  coefficients: tuple[float, float, float]
  """Coefficients of 1, x and x^2, with x = ln N, to draw the curve."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
  """A budget without a minimum, and why."""

  budget: float
  why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
  """N* = coefficient * C^exponent."""

  exponent: float
  coefficient: float
  interval: Span
  """Interval of the exponent; (nan, nan) if the runs do not allow one."""
  level: float
  minima: tuple[Minimum, ...] = ()
  """Approach 2 only, like `refused`."""
  refused: tuple[Refused, ...] = ()
  fit: fit_lib.Fit | None = None
  """Approach 3 only."""

  def best_n(self, budget: ArrayLike) -> Floats:
    """Returns N* at a budget."""
    c = np.asarray(budget, np.float64)
    return np.asarray(self.coefficient * c**self.exponent)


def minima(
  budget: ArrayLike, n: ArrayLike, loss: ArrayLike
) -> tuple[tuple[Minimum, ...], tuple[Refused, ...]]:
  """Fits a parabola of loss over ln N at every budget.

  Args:
    budget: [runs] training FLOPs; equal within 2% counts as one budget.
    n: [runs] what is varied: N, or tokens, or another positive size.
    loss: [runs] nats per token; each seed is a separate row.

  Returns:
    The minima in the order of budgets, and the budgets without one, because of fewer than
    three sizes, a curve that does not open upwards, a minimum on or beyond the edge, or a
    curvature that scatter alone could cause (Student's t of the quadratic coefficient,
    one-sided at 5%; three runs are too few for this test).

  Raises:
    UserError: columns of different lengths, or a value that is not positive and finite.
  """
  found, refused = [], []
  for c, x, y in _by_budget(budget, n, loss):
    result = _minimum(c, x, y)
    (found if isinstance(result, Minimum) else refused).append(result)
  return tuple(found), tuple(refused)


def approach_2(
  budget: ArrayLike,
  n: ArrayLike,
  loss: ArrayLike,
  *,
  num_draws: int = 500,
  level: float = 0.9,
  seed: int = 0,
) -> Allocation:
  """Fits N* = k C^exponent to the minima of isoFLOP curves.

  The interval resamples the parabolas' residuals, pooled over budgets. It reflects only
  the scatter of runs, not whether a parabola is the right shape.

  Raises:
    UserError: as for `minima`, or fewer than two budgets have a minimum; each is named.
  """
  found, refused = minima(budget, n, loss)
  if len(found) < 2:
    why = "; ".join(f"C={r.budget:.3g}: {r.why}" for r in refused)
    raise UserError(
      f"{len(found)} budgets have a minimum, and an exponent needs two. "
      f"{why or 'Add a budget'}."
    )
  exponent, log_k = _line(found)
  kept = [
    (c, x, y)
    for c, x, y in _by_budget(budget, n, loss)
    if any(m.budget == c for m in found)
  ]
  draws = _redraw(kept, found, num_draws, np.random.default_rng(seed))
  return Allocation(
    exponent=exponent,
    coefficient=math.exp(log_k),
    interval=_interval(draws, level),
    level=level,
    minima=found,
    refused=refused,
  )


def approach_3(n: ArrayLike, d: ArrayLike, loss: ArrayLike, **options: Any) -> Allocation:
  """Fits Chinchilla's law and derives N* = k C^exponent, with C = 6 N D.

  Args:
    n: [runs] parameters.
    d: [runs] tokens.
    loss: [runs] nats per token.
    **options: of `fit.fit`.

  Raises:
    UserError: as `fit.fit`.
  """
  fitted = fit_lib.fit(laws.Chinchilla, {"N": n, "D": d}, loss, **options)
  names = fitted.law.constant_names()
  draws = np.array([_split(dict(zip(names, x)))[0] for x in fitted.draws])
  exponent, coefficient = _split(fitted.law.constants)
  return Allocation(
    exponent=exponent,
    coefficient=coefficient,
    interval=_interval(draws, fitted.level),
    level=fitted.level,
    fit=fitted,
  )


def _split(constants: Mapping[str, float]) -> tuple[float, float]:
  """Returns exponent and coefficient of N* (arXiv:2203.15556, equation 4)."""
  a, alpha, b, beta = (constants[name] for name in ("a", "alpha", "b", "beta"))
  exponent = beta / (alpha + beta)
  scale = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
  return exponent, scale * 6**-exponent


def _by_budget(
  budget: ArrayLike, n: ArrayLike, loss: ArrayLike
) -> list[tuple[float, Floats, Floats]]:
  """Returns (C, ln N, loss) of each budget, by C."""
  c, n, loss = (np.atleast_1d(np.asarray(v, np.float64)) for v in (budget, n, loss))
  if not (c.shape == n.shape == loss.shape) or c.ndim != 1 or not len(c):
    raise UserError(
      f"budget, n and loss need one value per run; shapes {c.shape}, {n.shape}, "
      f"{loss.shape}."
    )
  for name, column in (("budget", c), ("n", n), ("loss", loss)):
    if not np.all(np.isfinite(column) & (column > 0)):
      raise UserError(f"{name}: every value must be finite and above 0.")
  order = np.argsort(c, kind="stable")
  starts = np.flatnonzero(np.diff(np.log(c[order])) > math.log1p(_SAME)) + 1
  groups = np.split(order, starts)
  return [(float(np.median(c[g])), np.log(n[g]), loss[g]) for g in groups]


def _minimum(budget: float, x: Floats, y: Floats) -> Minimum | Refused:
  sizes = np.unique(x)
  if len(sizes) < _PARABOLA:
    return Refused(
      budget=budget, why=f"{len(sizes)} sizes, and a parabola needs {_PARABOLA}"
    )
  means = np.array([y[x == size].mean() for size in sizes])
  lowest = int(means.argmin())
  if lowest in (0, len(sizes) - 1):
    side = "smaller" if lowest == 0 else "larger"
    return Refused(
      budget=budget,
      why=f"the lowest loss is at the edge, N={math.exp(sizes[lowest]):.3g}: "
      f"add {side} sizes",
    )
  centre, (c0, c1, c2) = _parabola(x, y)
  vertex = centre - c1 / (2 * c2) if c2 > 0 else math.nan
  if not sizes[0] < vertex < sizes[-1]:
    return Refused(
      budget=budget,
      why="the parabola has no minimum between the sizes that ran",
    )
  t, needed = _curvature_t(x - centre, y, (c0, c1, c2))
  if t < needed:
    return Refused(
      budget=budget,
      why="the curvature cannot be distinguished from the scatter of the losses "
      f"(t={t:.2g}, and {needed:.2g} is needed): add sizes further away, or seeds",
    )
  return Minimum(
    budget=budget,
    N=math.exp(vertex),
    loss=c0 - c1 * c1 / (4 * c2),
    curvature=2 * c2,
    coefficients=(
      c0 - c1 * centre + c2 * centre * centre,
      c1 - 2 * c2 * centre,
      c2,
    ),
  )


def _parabola(x: Floats, y: NDArray[Any]) -> tuple[float, tuple[float, float, float]]:
  """Returns the centre of x, and the least-squares coefficients around it."""
  centre = float(x.mean())
  c0, c1, c2 = np.polynomial.polynomial.polyfit(x - centre, y, 2)
  return centre, (float(c0), float(c1), float(c2))


def _curvature_t(
  x: Floats, y: Floats, coefficients: tuple[float, float, float]
) -> tuple[float, float]:
  """Returns t of a parabola's quadratic coefficient, and its least accepted value."""
  freedom = len(x) - _PARABOLA
  if freedom < 1:
    return math.inf, 0.0
  missed = y - np.polynomial.polynomial.polyval(x, coefficients)
  powers = np.polynomial.polynomial.polyvander(x, 2)
  variance = float(missed @ missed) / freedom * np.linalg.inv(powers.T @ powers)[2, 2]
  t = coefficients[2] / math.sqrt(variance) if variance > 0 else math.inf
  return t, float(stats.t.ppf(_CERTAIN, freedom))


def _line(found: tuple[Minimum, ...]) -> tuple[float, float]:
  """Returns slope and intercept of ln N* over ln C."""
  log_c = np.log([m.budget for m in found])
  log_n = np.log([m.N for m in found])
  slope = np.polynomial.polynomial.polyfit(log_c - log_c.mean(), log_n, 1)[1]
  return float(slope), float(log_n.mean() - slope * log_c.mean())


def _redraw(
  runs: list[tuple[float, Floats, Floats]],
  found: tuple[Minimum, ...],
  num_draws: int,
  rng: np.random.Generator,
) -> Floats:
  """Returns exponents of resampled curves; empty if too many have no minimum."""
  curves = [
    np.polynomial.polynomial.polyval(x, m.coefficients)
    for (_, x, _), m in zip(runs, found)
  ]
  freedom = sum(len(x) - _PARABOLA for _, x, _ in runs)
  if freedom < 1:
    return np.empty(0)
  residuals = np.concatenate([y - curve for (_, _, y), curve in zip(runs, curves)])
  residuals *= math.sqrt(len(residuals) / freedom)
  log_c = np.log([m.budget for m in found])
  log_c -= log_c.mean()
  draws = []
  for _ in range(num_draws):
    vertices = []
    for (_, x, _), curve in zip(runs, curves):
      centre, (_, c1, c2) = _parabola(x, curve + rng.choice(residuals, len(x)))
      vertices.append(centre - c1 / (2 * c2) if c2 > 0 else math.nan)
    if np.all(np.isfinite(vertices)):
      draws.append(log_c @ np.array(vertices) / (log_c @ log_c))
  # Leaving them out would narrow the interval.
  return np.array(draws if len(draws) >= _ENOUGH * num_draws else [])


def _interval(draws: Floats, level: float) -> Span:
  if not len(draws):
    return math.nan, math.nan
  low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)
