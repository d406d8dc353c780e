"""How much faster a variant reaches a quality than a baseline, with an interval.

Two kinds of answer, which need different runs:

- `effective`: how much more compute the baseline would need to reach the variant's loss,
  along the baseline's own law L = l_inf + a C^-alpha, if both were trained with the same
  C. `over_seeds` adds an interval; `against_baseline` reads the law off several baseline
  runs, with the lack-of-fit interval of an inverse regression.
- `to_quality`: without a law. When does the variant's loss curve reach the loss at which
  the baseline ends? In whatever unit the curves are in: steps, FLOPs or seconds.

A speedup above 1 says that the variant is faster.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from moejax.errors import UserError
from moejax.sweep.laws.law import Floats

FEW_SEEDS = 5
"""Below it a bootstrap over seeds is narrower than its level says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speedup:
  """A ratio of costs to the same loss, with its interval."""

  ratio: float
  """Baseline over variant; 0 if the variant does not get there."""
  low: float
  high: float
  """Infinite where the data put no bound; nan, as `low`, without an interval."""
  level: float
  how: str
  """Method of the interval."""
  target: float
  """The loss that both reach."""
  notes: tuple[str, ...] = ()


def effective(
  baseline: float,
  variant: float,
  *,
  l_inf: float,
  alpha: float,
  baseline_speed: float = 1.0,
  variant_speed: float = 1.0,
) -> float:
  """Returns ((L_baseline - l_inf) / (L_variant - l_inf))^(1 / alpha), in time.

  Both were trained with the same C. The baseline reaches the variant's loss at that
  multiple of C, by L = l_inf + a C^-alpha, since a = (L_baseline - l_inf) C^alpha. The
  ratio in time divides by what the variant loses in throughput.

  Args:
    baseline: loss of the baseline.
    variant: loss of the variant.
    l_inf: irreducible loss under the evaluation that gave both losses.
    alpha: exponent of the baseline's law, above 0.
    baseline_speed: FLOPs (or tokens, if C counts tokens) per second; 1 for both leaves
      time out.
    variant_speed: likewise.

  Raises:
    UserError: a loss not above l_inf, or an exponent or speed not above 0.
  """
  for name, value in (
    ("alpha", alpha),
    ("baseline_speed", baseline_speed),
    ("variant_speed", variant_speed),
  ):
    if not (value > 0 and math.isfinite(value)):
      raise UserError(f"{name}={value:g}: it must be above 0.")
  _above(l_inf, baseline, variant)
  in_flops = ((baseline - l_inf) / (variant - l_inf)) ** (1 / alpha)
  return in_flops * variant_speed / baseline_speed


def over_seeds(
  baseline: ArrayLike,
  variant: ArrayLike,
  *,
  l_inf: float,
  alpha: float,
  speed_ratio: float = 1.0,
  level: float = 0.9,
  num_draws: int = 2000,
  seed: int = 0,
) -> Speedup:
  """Returns `effective` of mean losses, with a bootstrap interval over seeds.

  Args:
    baseline: [seeds] final losses.
    variant: [seeds] final losses, not paired with the baseline's.
    l_inf: as `effective`.
    alpha: as `effective`; its own error is not part of the interval.
    speed_ratio: throughput of the variant over the baseline's.
    level: of the interval.
    num_draws: bootstrap samples.
    seed: of the bootstrap.

  Raises:
    UserError: as `effective`.
  """
  losses = [np.atleast_1d(np.asarray(v, np.float64)) for v in (baseline, variant)]
  _above(l_inf, *losses[0], *losses[1])
  means = [float(v.mean()) for v in losses]
  ratio = effective(
    *means, l_inf=l_inf, alpha=alpha, variant_speed=speed_ratio, baseline_speed=1.0
  )
  low, high, notes = math.nan, math.nan, []
  if min(len(v) for v in losses) < 2:
    notes.append("one seed: no interval")
  else:
    result = stats.bootstrap(
      tuple(losses),
      lambda b, v, axis: (
        speed_ratio * ((b.mean(axis) - l_inf) / (v.mean(axis) - l_inf)) ** (1 / alpha)
      ),
      n_resamples=num_draws,
      confidence_level=level,
      method="percentile",
      rng=np.random.default_rng(seed),
    )
    low, high = (float(v) for v in result.confidence_interval)
    notes += _few(min(len(v) for v in losses))
  return Speedup(
    ratio=ratio,
    low=low,
    high=high,
    level=level,
    how="bootstrap over seeds",
    target=means[1],
    notes=tuple(notes),
  )


def against_baseline(
  compute: ArrayLike,
  loss: ArrayLike,
  *,
  variant_compute: float,
  variant_loss: float,
  l_inf: float,
  level: float = 0.9,
) -> Speedup:
  """Returns C_needed / C of a variant, C_needed from a line through baseline runs.

  ln(L - l_inf) = ln a - alpha ln C is fitted to the baseline by least squares. C_needed
  is where the line has the variant's loss. Its interval is that of an inverse regression
  (Fieller), with Student's t of n - 2 degrees of freedom: it takes the scatter of the
  baseline's runs around the line, lack of fit included, as the error of every run, also
  of the variant.

  Args:
    compute: [n] training FLOPs of the baseline's runs, n >= 3.
    loss: [n] their losses.
    variant_compute: C of the variant.
    variant_loss: its loss, of the same evaluation.
    l_inf: irreducible loss under that evaluation.
    level: of the interval.

  Raises:
    UserError: fewer than 3 runs, all at one C, a loss not above l_inf, or a baseline
      whose loss does not fall with compute.
  """
  c, y = (np.atleast_1d(np.asarray(v, np.float64)) for v in (compute, loss))
  if c.shape != y.shape or len(c) < 3:
    raise UserError(
      f"The baseline has {len(c)} values of C and {len(y)} losses; a line with an "
      "interval needs at least 3 runs."
    )
  _above(l_inf, *y, variant_loss)
  x, y = np.log(c), np.log(y - l_inf)
  if np.ptp(x) == 0:
    raise UserError(f"All baseline runs have C={c[0]:g}; the line needs two or more.")
  slope = float(np.polynomial.polynomial.polyfit(x - x.mean(), y, 1)[1])
  if not slope < 0:
    raise UserError(
      f"The baseline's loss does not fall with compute (slope {slope:.3g} in log "
      "space), so it has no speedup."
    )
  target = math.log(variant_loss - l_inf)
  needed = x.mean() + (target - y.mean()) / slope
  low, high = _fieller(x, y, slope, target, level)
  own = math.log(variant_compute)
  notes = []
  if not x.min() <= needed <= x.max():
    notes.append(
      f"needed C={math.exp(needed):.3g} is outside the baseline's "
      f"{c.min():.3g} to {c.max():.3g}"
    )
  if not math.isfinite(high):
    notes.append("the baseline's slope is not told from 0: no upper bound")
  return Speedup(
    ratio=math.exp(needed - own),
    low=math.exp(low - own),
    high=math.exp(high - own),
    level=level,
    how=f"lack of fit, Student t, {len(x) - 2} degrees of freedom",
    target=variant_loss,
    notes=tuple(notes),
  )


def _fieller(
  x: Floats, y: Floats, slope: float, target: float, level: float
) -> tuple[float, float]:
  """Returns the interval of the x at which a line through (x, y) meets `target`."""
  freedom = len(x) - 2
  spread = float(np.sum((x - x.mean()) ** 2))
  missed = y - y.mean() - slope * (x - x.mean())
  scatter = math.sqrt(float(missed @ missed) / freedom)
  t = float(stats.t.ppf((1 + level) / 2, freedom))
  room = slope**2 - (t * scatter) ** 2 / spread
  if room <= 0:
    return -math.inf, math.inf
  height = target - y.mean()
  middle = float(x.mean()) + slope * height / room
  # One observation of the variant, and the line's own error.
  reach = t * scatter * math.sqrt(room * (1 + 1 / len(x)) + height**2 / spread) / room
  return middle - reach, middle + reach


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
  """One run's loss over its cost."""

  cost: Floats
  """[points], increasing: steps, FLOPs or seconds, counted from the start."""
  loss: Floats
  """[points], nats per token."""


def smooth(loss: ArrayLike) -> Floats:
  """Returns the non-increasing sequence closest to a loss curve in least squares.

  Isotonic regression: no window to choose, and no bias towards lucky batches, which a
  running minimum has.
  """
  values = np.asarray(loss, np.float64)
  return np.asarray(optimize.isotonic_regression(values, increasing=False).x)


def cost_to(curve: Curve, target: float) -> float:
  """Returns the cost at which the smoothed curve first reaches a loss; inf if never.

  Linear between points. A curve that starts below the target returns its first cost.
  """
  loss = smooth(curve.loss)
  reached = np.flatnonzero(loss <= target)
  if not len(reached):
    return math.inf
  i = int(reached[0])
  if i == 0:
    return float(curve.cost[0])
  part = (loss[i - 1] - target) / (loss[i - 1] - loss[i])
  return float(curve.cost[i - 1] + part * (curve.cost[i] - curve.cost[i - 1]))


def to_quality(
  baseline: Sequence[Curve],
  variant: Sequence[Curve],
  *,
  target: float | None = None,
  level: float = 0.9,
  num_draws: int = 1000,
  seed: int = 0,
) -> Speedup:
  """Returns the baseline's cost to a loss over the variant's.

  Curves of the seeds are averaged, then smoothed. The interval draws seeds of each side
  with replacement and repeats everything, the target included.

  Args:
    baseline: a curve per seed.
    variant: a curve per seed, cost in the same unit.
    target: nats per token; None is the smoothed loss at which the baseline ends.
    level: of the interval.
    num_draws: bootstrap samples.
    seed: of the bootstrap.

  Raises:
    UserError: no curve, a curve that is not increasing in cost or has unusable numbers,
      seeds without common costs, or a target that the baseline does not reach.
  """
  sides = [_table(baseline, "baseline"), _table(variant, "variant")]
  slow, fast = (Curve(cost=c, loss=losses.mean(axis=0)) for c, losses in sides)
  goal = float(smooth(slow.loss)[-1]) if target is None else target
  ratio = _ratio(slow, fast, goal)
  seeds = [len(losses) for _, losses in sides]
  notes, draws = [], np.empty(0)
  if ratio == 0:
    most = cost_to(slow, goal) / fast.cost[-1]
    notes.append(f"the variant never reaches {goal:.4g}: its speedup is below {most:.3g}")
  if min(seeds) < 2:
    notes.append("one seed: no interval")
  else:
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(num_draws):
      slow, fast = (
        Curve(cost=c, loss=losses[rng.integers(len(losses), size=len(losses))].mean(0))
        for c, losses in sides
      )
      aim = float(smooth(slow.loss)[-1]) if target is None else target
      drawn.append(_ratio(slow, fast, aim, strict=False))
    draws = np.array(drawn)
    notes += _few(min(seeds))
  tails = ((1 - level) / 2, (1 + level) / 2)
  # Not interpolated: draws may be infinite.
  low, high = (
    np.quantile(draws, tails, method="nearest") if len(draws) else (math.nan, math.nan)
  )
  return Speedup(
    ratio=ratio,
    low=float(low),
    high=float(high),
    level=level,
    how="bootstrap over seeds",
    target=goal,
    notes=tuple(notes),
  )


def _ratio(
  baseline: Curve, variant: Curve, target: float, *, strict: bool = True
) -> float:
  """Returns the ratio of costs: 0 if the variant fails, inf if only the baseline does."""
  ours, theirs = cost_to(variant, target), cost_to(baseline, target)
  if strict and not math.isfinite(theirs):
    raise UserError(f"target={target:g}: the baseline never reaches this loss.")
  if not math.isfinite(ours):
    return 0.0
  if ours <= 0:
    raise UserError("The variant reaches the target at cost 0; count from the start.")
  return theirs / ours


def _table(curves: Sequence[Curve], side: str) -> tuple[Floats, Floats]:
  """Returns costs common to all seeds, and [seeds, points] losses there."""
  if not curves:
    raise UserError(f"The {side} has no loss curve.")
  for curve in curves:
    usable = np.isfinite(curve.cost).all() and np.isfinite(curve.loss).all()
    if curve.cost.shape != curve.loss.shape or curve.cost.ndim != 1 or not usable:
      raise UserError(f"The {side}: a curve needs finite costs and losses, in pairs.")
    if not len(curve.cost) or np.any(np.diff(curve.cost) <= 0):
      raise UserError(f"The {side}: the costs of a curve must increase.")
  start = max(curve.cost[0] for curve in curves)
  end = min(curve.cost[-1] for curve in curves)
  common = curves[0].cost[(curves[0].cost >= start) & (curves[0].cost <= end)]
  if not len(common):
    raise UserError(f"The {side}: its seeds' curves have no cost in common.")
  return common, np.stack([np.interp(common, c.cost, c.loss) for c in curves])


def _above(l_inf: float, *losses: float) -> None:
  for loss in losses:
    if not (loss > l_inf and math.isfinite(loss)):
      raise UserError(
        f"l_inf={l_inf:g} is not below the loss {loss:g}: it belongs to another "
        "evaluation, or was fitted too high."
      )


def _few(seeds: int) -> list[str]:
  if seeds >= FEW_SEEDS:
    return []
  return [f"{seeds} seeds: the interval is narrower than it should be"]
