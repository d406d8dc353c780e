"""Fits a scaling law to the runs of a sweep, and says how far to trust the result.

    fitted = fit.fit(laws.Chinchilla, {"N": n, "D": d}, loss)
    fitted.law.predict(N=1e9, D=2e10)      # warns outside of the fitted runs
    fitted.intervals["alpha"]              # 90% bootstrap interval
    fitted.held_out                        # error on runs that the fit did not see

The objective is the Huber loss of the residuals of log L, as in Hoffmann et al.,
arXiv:2203.15556, section 3.3, minimised from the best points of a grid. Rows with equal
inputs (the seeds of one setting) are one point: they are resampled and held out together,
since a fit that has seen one seed has seen the setting.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from moejax.errors import UserError
from moejax.sweep import laws
from moejax.sweep.law import Floats, Law, Span
from moejax.sweep.solve import Problem

FOLDS = 5
_FEW = 4
"""Below so many degrees of freedom an interval is the range of its draws."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
  """Error of a fit on points that it did not see."""

  how: str
  """Which points were held out."""
  num_points: int
  error: float
  """Root mean square of log(predicted / measured): about the relative error."""
  r2: float
  """1 - squared error over the variance of the held-out losses; nan if they are equal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
  """A fitted law, and what is known about its error."""

  law: Law
  """With the fitted constants; its `ranges` are those of the runs."""
  fixed: tuple[str, ...]
  """Constants that were given, not fitted."""
  intervals: Mapping[str, Span]
  """Bootstrap interval of each fitted constant; empty without draws."""
  level: float
  tails: Span
  """Quantiles of the draws that bound an interval; see `tails_of`."""
  draws: Floats
  """[num_draws, constants]: bootstrap fits, in the order of `law.constants`."""
  error: float
  """As `HeldOut.error`, on the fitted rows."""
  r2: float
  num_rows: int
  num_points: int
  """Distinct settings; seeds of one setting are one point."""
  num_parameters: int
  held_out: tuple[HeldOut, ...]
  notes: tuple[str, ...]
  """What limits the fit, in sentences."""

  def interval(self, **inputs: ArrayLike) -> tuple[Floats, Floats]:
    """Returns the bootstrap interval of the law's value at some inputs.

    It covers the error of the fitted constants, not the scatter of a single run.

    Raises:
      UserError: the fit was made without draws, or an input is wrong.
    """
    if not len(self.draws):
      raise UserError("No interval: the fit was made with num_draws=0.")
    arrays = self.law.checked(**inputs)
    names = self.law.constant_names()
    values = np.stack(
      [
        dataclasses.replace(self.law, **dict(zip(names, draw))).formula(**arrays)
        for draw in self.draws
      ]
    )
    low, high = np.quantile(values, self.tails, axis=0)
    return np.asarray(low), np.asarray(high)


def fit(
  law: type[Law],
  inputs: Mapping[str, ArrayLike],
  output: ArrayLike,
  *,
  fixed: Mapping[str, float] | None = None,
  compute: ArrayLike | None = None,
  delta: float = 0.01,
  num_starts: int = 6,
  published: bool = True,
  num_draws: int = 400,
  level: float = 0.9,
  resample: str = "points",
  seed: int = 0,
  **settings: Any,
) -> Fit:
  """Fits a law's constants to measured losses.

  Args:
    law: a class of moejax.sweep.laws.
    inputs: [rows] per letter of the law; a scalar holds for all rows.
    output: [rows] loss in nats per token (leverage for `Ling`), above 0.
    fixed: constants that are given. Small sweeps do not determine all of them: e_start
      and e_max need many values of E, an irreducible loss needs a decade of compute.
    compute: [rows] training FLOPs, to hold out the largest; None is 6 N D, or C.
    delta: where the Huber loss turns linear, in log L. Papers use 0.1 (Krajewski), 0.01
      (Ludziejewski) and 1e-3 (Chinchilla, Abnar).
    num_starts: points of the grid of starts from which to minimise.
    published: whether the published constants join the grid.
    num_draws: bootstrap samples; 0 makes no intervals.
    level: of the intervals.
    resample: `points` draws settings with replacement; `residuals` adds resampled
      residuals to the fit, for designs too small to lose a setting.
    seed: of the bootstrap and of the folds.
    **settings: other fields of the law, such as `evaluation`.

  Raises:
    UserError: an unknown letter or constant, unusable numbers, or fewer settings than
      free constants.
  """
  if resample not in ("points", "residuals"):
    raise UserError(f"resample={resample}: choose points or residuals.")
  if not 0 < level < 1:
    raise UserError(f"level={level:g}: it must be between 0 and 1, such as 0.9.")
  rows, measured = _table(law, inputs, output)
  problem = Problem.of(law, fixed or {}, delta, settings, published=published)
  points = _points(rows)
  num_points, num_free = int(points.max()) + 1, len(problem.free)
  if num_points < num_free:
    raise UserError(
      f"{law.__name__} has {num_free} free constants and the sweep {num_points} distinct "
      f"settings: add runs, or fix constants ({', '.join(problem.free)})."
    )
  solution = problem.solve(rows, measured, num_starts)
  fitted = problem.law_of(solution.x)
  notes = problem.weaknesses(solution)
  if num_points == num_free:
    notes.append("as many settings as constants: the fit passes through all of them")
  predicted = np.asarray(fitted.formula(**rows))
  rng = np.random.default_rng(seed)
  held_out = _hold_out(
    problem, rows, measured, points, _flops(rows, compute), solution.x, rng
  )
  draws = np.empty((0, len(law.constant_names())))
  if num_draws and num_points > num_free:
    draws = _bootstrap(
      problem, rows, measured, points, solution.x, num_draws, resample == "points", rng
    )
  freedom = num_points - num_free
  tails = tails_of(level, num_points, freedom, by_points=resample == "points")
  bounds = np.quantile(draws, tails, axis=0) if len(draws) else ()
  if 0 < freedom < _FEW:
    notes.append(f"only {freedom} more settings than constants: intervals are too narrow")
  return Fit(
    law=dataclasses.replace(fitted, ranges=_ranges(rows)),
    fixed=problem.fixed_names,
    intervals={
      name: (float(low), float(high))
      for name, low, high in zip(law.constant_names(), *bounds)
      if name in problem.free
    }
    if len(draws)
    else {},
    level=level,
    tails=tails,
    draws=draws,
    error=_log_error(predicted, measured),
    r2=_r2(predicted, measured),
    num_rows=len(measured),
    num_points=num_points,
    num_parameters=num_free,
    held_out=held_out,
    notes=tuple(notes),
  )


def power_law(
  compute: ArrayLike,
  loss: ArrayLike,
  *,
  evaluation: str,
  l_inf: float | None = None,
  **options: Any,
) -> Fit:
  """Fits L = l_inf + a C^-alpha.

  Args:
    compute: [rows] training FLOPs.
    loss: [rows] nats per token.
    evaluation: name of the evaluation that gave the losses; stored with l_inf, which
      has no meaning under another one.
    l_inf: pins the irreducible loss; None fits it.
    **options: of `fit`.

  Raises:
    UserError: as `fit`, or a pinned l_inf that is not below every loss.
  """
  if not evaluation:
    raise UserError("evaluation='': name the evaluation that l_inf belongs to.")
  if l_inf is not None and not 0 <= l_inf < np.min(np.asarray(loss, np.float64)):
    raise UserError(
      f"l_inf={l_inf:g}: the irreducible loss must be below the lowest measured loss, "
      f"{np.min(np.asarray(loss, np.float64)):g}."
    )
  fixed = {} if l_inf is None else {"l_inf": l_inf}
  inputs = {"C": compute}
  return fit(laws.PowerLaw, inputs, loss, fixed=fixed, evaluation=evaluation, **options)


def _table(
  law: type[Law], inputs: Mapping[str, ArrayLike], output: ArrayLike
) -> tuple[dict[str, Floats], Floats]:
  """Returns inputs and output as equally long columns."""
  measured = np.atleast_1d(np.asarray(output, np.float64))
  if measured.ndim != 1 or not len(measured):
    raise UserError(f"{law.output}: one number per run, not shape {measured.shape}.")
  if not np.all(np.isfinite(measured) & (measured > 0)):
    bad = measured[~(np.isfinite(measured) & (measured > 0))]
    raise UserError(f"{law.output}={bad[0]:g}: it must be finite and above 0.")
  columns = law.checked(**inputs)
  for name, column in columns.items():
    if column.ndim and column.shape != measured.shape:
      raise UserError(f"{name} has {column.shape} values for {len(measured)} runs.")
    if np.any(column < 0):
      raise UserError(f"{name}={column.min():g}: it must not be negative.")
  return {k: np.broadcast_to(v, measured.shape) for k, v in columns.items()}, measured


def _points(rows: Mapping[str, Floats]) -> NDArray[np.int64]:
  """Returns the number of each row's setting, from 0."""
  table = np.stack(list(rows.values()), axis=1)
  return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)


def _flops(rows: Mapping[str, Floats], compute: ArrayLike | None) -> Floats | None:
  if compute is not None:
    return np.broadcast_to(
      np.asarray(compute, np.float64), next(iter(rows.values())).shape
    )
  if "C" in rows:
    return rows["C"]
  return 6 * rows["N"] * rows["D"] if {"N", "D"} <= set(rows) else None


def _ranges(rows: Mapping[str, Floats]) -> dict[str, Span]:
  return {name: (float(v.min()), float(v.max())) for name, v in rows.items()}


def tails_of(level: float, num_points: int, freedom: int, *, by_points: bool) -> Span:
  """Returns the quantiles of bootstrap draws that make an interval of some level.

  A percentile interval is too narrow for few points, as a normal interval is beside
  Student's. The expanded percentile interval (Hesterberg, arXiv:1411.5279)
  goes out to the quantile that a t interval would reach: 6 points and 2 constants go from
  5% to 0.5%.

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


def _log_error(predicted: Floats, measured: Floats) -> float:
  return float(np.sqrt(np.mean((np.log(predicted) - np.log(measured)) ** 2)))


def _r2(predicted: Floats, measured: Floats) -> float:
  spread = float(np.sum((measured - measured.mean()) ** 2))
  missed = float(np.sum((measured - predicted) ** 2))
  return 1 - missed / spread if spread > 0 else math.nan


def _hold_out(
  problem: Problem,
  rows: Mapping[str, Floats],
  measured: Floats,
  points: NDArray[np.int64],
  compute: Floats | None,
  solution: Floats,
  rng: np.random.Generator,
) -> tuple[HeldOut, ...]:
  """Returns errors of k-fold and of the largest compute, where enough points remain."""
  num_points, results = int(points.max()) + 1, []
  folds = min(FOLDS, num_points)
  if num_points - math.ceil(num_points / folds) >= len(problem.free) and folds > 1:
    fold_of = rng.permutation(num_points) % folds
    predicted = np.empty_like(measured)
    for fold in range(folds):
      out = fold_of[points] == fold
      predicted[out] = _predict_held_out(problem, rows, measured, out, solution)
    results.append(_held_out(f"{folds} folds", num_points, predicted, measured))
  if compute is not None:
    # Budgets of an isoFLOP sweep are met within 1%.
    out = compute >= compute.max() * 0.98
    seen = len(np.unique(points[~out]))
    if seen >= len(problem.free):
      predicted = _predict_held_out(problem, rows, measured, out, solution)
      how = f"C above {compute[~out].max():.3g}"
      count = len(np.unique(points[out]))
      results.append(_held_out(how, count, predicted, measured[out]))
  return tuple(results)


def _held_out(how: str, num_points: int, predicted: Floats, measured: Floats) -> HeldOut:
  return HeldOut(
    how=how,
    num_points=num_points,
    error=_log_error(predicted, measured),
    r2=_r2(predicted, measured),
  )


def _predict_held_out(
  problem: Problem,
  rows: Mapping[str, Floats],
  measured: Floats,
  out: NDArray[np.bool_],
  solution: Floats,
) -> Floats:
  """Fits the other rows, started at the fit to all and at the grid."""
  seen = {name: column[~out] for name, column in rows.items()}
  solution = problem.solve(seen, measured[~out], num_starts=1, also=solution).x
  unseen = {name: column[out] for name, column in rows.items()}
  return np.asarray(problem.law_of(solution).formula(**unseen))


def _bootstrap(
  problem: Problem,
  rows: Mapping[str, Floats],
  measured: Floats,
  points: NDArray[np.int64],
  solution: Floats,
  num_draws: int,
  by_points: bool,
  rng: np.random.Generator,
) -> Floats:
  """Returns [num_draws, constants]: fits to resampled rows, started at the solution."""
  num_points, num_free = int(points.max()) + 1, len(problem.free)
  members = [np.flatnonzero(points == point) for point in range(num_points)]
  predicted = np.asarray(problem.law_of(solution).formula(**rows))
  residuals = np.log(measured / predicted)
  # Fitting shrinks residuals by the degrees of freedom that it uses.
  spread = (residuals - residuals.mean()) * math.sqrt(
    len(measured) / max(len(measured) - num_free, 1)
  )
  draws = np.empty((num_draws, len(problem.law.constant_names())))
  for i in range(num_draws):
    if by_points:
      drawn = rng.integers(num_points, size=num_points)
      # Fewer distinct points than constants determine nothing.
      while len(np.unique(drawn)) < num_free:
        drawn = rng.integers(num_points, size=num_points)
      index = np.concatenate([members[point] for point in drawn])
      sample, values = {k: v[index] for k, v in rows.items()}, measured[index]
    else:
      sample, values = rows, predicted * np.exp(rng.choice(spread, len(measured)))
    drawn_fit = problem.law_of(problem.polish(sample, values, solution).x)
    draws[i] = list(drawn_fit.constants.values())
  return draws
