"""Fits a scaling law to the runs of a sweep, with estimates of its error.

    fitted = fit.fit(laws.Chinchilla, {"N": n, "D": d}, loss)
    fitted.law.predict(N=1e9, D=2e10)      # warns outside of the fitted runs
    fitted.intervals["alpha"]              # 90% bootstrap interval
    fitted.held_out                        # error on runs that the fit did not see

The objective is the Huber loss of the residuals of log L, as in Hoffmann et al.,
arXiv:2203.15556, section 3.3, minimised from the best points of a grid. Rows with equal
inputs (the seeds of one setting) are one point: they are resampled and held out together,
since a fit to one seed is already a fit to the setting.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from moejax.errors import UserError
from moejax.sweep.laws import published as laws
from moejax.sweep.laws import resample as resampling
from moejax.sweep.laws.law import Floats, Law, Span
from moejax.sweep.laws.resample import HeldOut
from moejax.sweep.laws.rows import Rows
from moejax.sweep.laws.solve import Problem

_CHANCE = 0.05
"""Largest p-value at which a trend counts as one."""
_TESTABLE = 3
"""Up to this many rows even a perfect order may be chance: with probability 1/6 at 3."""
_FEW = 4
"""With fewer degrees of freedom, an interval is the range of its draws."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
  """A fitted law, with estimates of its error."""

  law: Law
  """With the fitted constants; its `ranges` are those of the runs."""
  fixed: tuple[str, ...]
  """Constants that were given, not fitted."""
  intervals: Mapping[str, Span]
  """Bootstrap interval of each fitted constant; empty without draws."""
  level: float
  tails: Span
  """Quantiles of the draws that bound an interval; see `resample.tails_of`."""
  draws: Floats
  """[num_draws, constants]: bootstrap fits, in the order of `law.constants`."""
  error: float
  """Like `HeldOut.error`, but on the fitted rows."""
  r2: float
  num_rows: int
  num_points: int
  """Distinct settings; seeds of one setting are one point."""
  num_parameters: int
  held_out: tuple[HeldOut, ...]
  notes: tuple[str, ...]
  """Sentences on the limits of the fit."""

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
    law: a class of moejax.sweep.laws.published.
    inputs: [rows] per letter of the law; a scalar holds for all rows.
    output: [rows] loss in nats per token (leverage for `Ling`), above 0.
    fixed: constants that are not fitted. Small sweeps do not determine all of them:
      e_start and e_max need many values of E, an irreducible loss needs a decade of
      compute.
    compute: [rows] training FLOPs, to hold out the largest; None is 6 N D, or C.
    delta: where the Huber loss turns linear, in log L. Papers use 0.1 (Krajewski), 0.01
      (Ludziejewski) and 1e-3 (Chinchilla, Abnar).
    num_starts: how many points of the grid of starts to minimise from.
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
  rows = Rows.of(law, inputs, output, compute)
  problem = Problem.of(law, fixed or {}, delta, settings, published=published)
  num_free, freedom = len(problem.free), rows.num_points - len(problem.free)
  if freedom < 0:
    raise UserError(
      f"{law.__name__} has {num_free} free constants and the sweep {rows.num_points} "
      f"distinct settings: add runs, or fix constants ({', '.join(problem.free)})."
    )
  solution = problem.solve(rows, num_starts)
  fitted = problem.law_of(solution.x)
  predicted = np.asarray(fitted.formula(**rows.inputs))
  rng, by_points = np.random.default_rng(seed), resample == "points"
  held_out = resampling.hold_out(problem, rows, solution.x, rng)
  draws = resampling.bootstrap(
    problem, rows, solution.x, num_draws if freedom else 0, rng, by_points=by_points
  )
  tails = resampling.tails_of(level, rows.num_points, freedom, by_points=by_points)
  return Fit(
    law=dataclasses.replace(fitted, ranges=rows.ranges),
    fixed=problem.fixed_names,
    intervals=_intervals(problem, draws, tails),
    level=level,
    tails=tails,
    draws=draws,
    error=resampling.log_error(predicted, rows.measured),
    r2=resampling.r_squared(predicted, rows.measured),
    num_rows=len(rows.measured),
    num_points=rows.num_points,
    num_parameters=num_free,
    held_out=held_out,
    notes=(*problem.weaknesses(solution), *_thin(freedom)),
  )


def _intervals(problem: Problem, draws: Floats, tails: Span) -> dict[str, Span]:
  """Returns the interval of each free constant; none without draws."""
  if not len(draws):
    return {}
  low, high = np.quantile(draws, tails, axis=0)
  spans = zip(problem.law.constant_names(), low, high)
  return {name: (float(a), float(b)) for name, a, b in spans if name in problem.free}


def _thin(freedom: int) -> list[str]:
  """Returns notes on a fit with few degrees of freedom."""
  if freedom == 0:
    return ["as many settings as constants: the fit passes through all of them"]
  if freedom < _FEW:
    return [f"only {freedom} more settings than constants: intervals are too narrow"]
  return []


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
    UserError: as for `fit`, a pinned l_inf that is not below every loss, or losses that
      do not fall with compute by more than their scatter.
  """
  if not evaluation:
    raise UserError("evaluation='': name the evaluation that l_inf belongs to.")
  if l_inf is not None and not 0 <= l_inf < np.min(np.asarray(loss, np.float64)):
    raise UserError(
      f"l_inf={l_inf:g}: the irreducible loss must be below the lowest measured loss, "
      f"{np.min(np.asarray(loss, np.float64)):g}."
    )
  rows = Rows.of(laws.PowerLaw, {"C": compute}, loss)
  _refuse_no_trend(rows.inputs["C"], rows.measured)
  fixed = {} if l_inf is None else {"l_inf": l_inf}
  inputs = {"C": compute}
  return fit(laws.PowerLaw, inputs, loss, fixed=fixed, evaluation=evaluation, **options)


def _refuse_no_trend(compute: Floats, loss: Floats) -> None:
  """Rejects losses that do not fall with compute: any alpha would fit them.

  Uses Kendall's tau, one-sided: it depends only on ranks, so neither an outlier nor a
  flattening curve hides a trend. If there are too few rows for a test at 5%, they only
  need to fall.
  """
  # Any: scipy's types lose those of a result's fields.
  found: Any = stats.kendalltau(compute, loss, alternative="less")
  tau, p = float(found.statistic), float(found.pvalue)
  spread = f"losses {loss.min():.4g} to {loss.max():.4g}"
  remedy = "Add runs at other budgets, or seeds."
  if not tau < 0:
    raise UserError(f"The loss does not fall with compute ({spread}): no alpha. {remedy}")
  if p > _CHANCE and len(loss) > _TESTABLE:
    raise UserError(
      f"The loss does not fall significantly with compute ({spread}; Kendall's tau "
      f"{tau:.2f}, p={p:.2f}): no alpha. {remedy}"
    )
