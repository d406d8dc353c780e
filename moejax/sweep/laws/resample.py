"""Held-out error of a fit, and the bootstrap of its constants."""

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moejax.sweep.laws.law import Floats, Span
from moejax.sweep.laws.rows import Rows
from moejax.sweep.laws.solve import Problem

FOLDS = 5
_SAME = 0.98
"""Fraction of the largest compute that counts as equal: isoFLOP sweeps meet it to 1%."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
  """Error of a fit on held-out points."""

  how: str
  """Which points were held out."""
  num_points: int
  error: float
  """Root mean square of log(predicted / measured): about the relative error."""
  r2: float
  """1 - squared error over the variance of the held-out losses; nan if they are equal."""


def log_error(predicted: Floats, measured: Floats) -> float:
  """Returns the root mean square of log(predicted / measured)."""
  return float(np.sqrt(np.mean((np.log(predicted) - np.log(measured)) ** 2)))


def r_squared(predicted: Floats, measured: Floats) -> float:
  """Returns 1 - squared error over variance; nan without variance."""
  spread = float(np.sum((measured - measured.mean()) ** 2))
  missed = float(np.sum((measured - predicted) ** 2))
  return 1 - missed / spread if spread > 0 else math.nan


def hold_out(
  problem: Problem, rows: Rows, solution: Floats, rng: np.random.Generator
) -> tuple[HeldOut, ...]:
  """Returns the errors of k folds and of the largest compute.

  A split that leaves fewer points than free constants is skipped.

  Args:
    problem: the fit.
    rows: all runs.
    solution: free constants of the fit to all runs, where the other fits start.
    rng: draws the folds.
  """
  num_points, results = rows.num_points, []
  folds = min(FOLDS, num_points)
  if folds > 1 and num_points - math.ceil(num_points / folds) >= len(problem.free):
    fold_of = rng.permutation(num_points) % folds
    predicted = np.empty_like(rows.measured)
    for fold in range(folds):
      out = fold_of[rows.point] == fold
      predicted[out] = _predict(problem, rows, out, solution)
    results.append(_held_out(f"{folds} folds", predicted, rows))
  if rows.compute is not None:
    out = rows.compute >= rows.compute.max() * _SAME
    if rows.take(~out).num_points >= len(problem.free):
      how = f"C above {rows.compute[~out].max():.3g}"
      predicted = _predict(problem, rows, out, solution)
      results.append(_held_out(how, predicted, rows.take(out)))
  return tuple(results)


def _held_out(how: str, predicted: Floats, rows: Rows) -> HeldOut:
  return HeldOut(
    how=how,
    num_points=rows.num_points,
    error=log_error(predicted, rows.measured),
    r2=r_squared(predicted, rows.measured),
  )


def _predict(
  problem: Problem, rows: Rows, out: NDArray[np.bool_], start: Floats
) -> Floats:
  """Fits the other rows, and returns predictions of those held out."""
  x = problem.solve(rows.take(~out), num_starts=1, also=start).x
  return np.asarray(problem.law_of(x).formula(**rows.take(out).inputs))


def bootstrap(
  problem: Problem,
  rows: Rows,
  solution: Floats,
  num_draws: int,
  rng: np.random.Generator,
  *,
  by_points: bool,
) -> Floats:
  """Returns [num_draws, constants]: fits to resampled rows, started at the solution."""
  num_points, num_free = rows.num_points, len(problem.free)
  members = [np.flatnonzero(rows.point == point) for point in range(num_points)]
  predicted = np.asarray(problem.law_of(solution).formula(**rows.inputs))
  residuals = np.log(rows.measured / predicted)
  # Fitting shrinks residuals by the degrees of freedom that it uses.
  num_rows = len(residuals)
  residuals = residuals - residuals.mean()
  residuals *= math.sqrt(num_rows / max(num_rows - num_free, 1))
  draws = np.empty((num_draws, len(problem.law.constant_names())))
  for i in range(num_draws):
    if by_points:
      drawn = rng.integers(num_points, size=num_points)
      # Fewer distinct points than constants determine nothing.
      while len(np.unique(drawn)) < num_free:
        drawn = rng.integers(num_points, size=num_points)
      sample = rows.take(np.concatenate([members[point] for point in drawn]))
    else:
      noise = rng.choice(residuals, num_rows)
      sample = dataclasses.replace(rows, measured=predicted * np.exp(noise))
    found = problem.law_of(problem.polish(sample, solution).x)
    draws[i] = list(found.constants.values())
  return draws


def tails_of(level: float, num_points: int, freedom: int, *, by_points: bool) -> Span:
  """Returns the quantiles of bootstrap draws that make an interval of some level.

  A percentile interval is too narrow for few points, like a normal interval compared with
  Student's. The expanded percentile interval (Hesterberg, arXiv:1411.5279) extends to the
  quantile that a t interval would reach: with 6 points and 2 constants, from 5% to 0.5%.

  Args:
    level: of the interval.
    num_points: n.
    freedom: n less the fitted constants; below 1 nothing is expanded.
    by_points: whether settings were resampled, which also shrinks the spread by
      sqrt(freedom / n); resampled residuals are already scaled by that.
  """
  if freedom < 1:
    return (1 - level) / 2, (1 + level) / 2
  reach = float(stats.t.ppf((1 + level) / 2, freedom))
  if by_points:
    reach *= math.sqrt(num_points / freedom)
  tail = float(stats.norm.sf(reach))
  return tail, 1 - tail
