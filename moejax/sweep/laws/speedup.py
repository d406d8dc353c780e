"""How much faster a variant reaches a quality than a baseline, with an interval.

There are two kinds of answer, which need different runs:

- `effective`: how much more compute the baseline would need to reach the variant's loss,
  by the baseline's own law L = l_inf + a C^-alpha, if both were trained with the same C.
  `over_seeds` adds an interval; `against_baseline` fits the law to several baseline runs,
  with the lack-of-fit interval of an inverse regression.
- `to_quality`: without a law, the cost at which the variant's loss curve reaches the loss
  at which the baseline ends, in the unit of the curves: steps, FLOPs or seconds. Its
  interval is Student's t of the logarithm of the ratio.

A speedup above 1 means that the variant is faster.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from moejax.errors import UserError
from moejax.sweep.laws import log_ratios
from moejax.sweep.laws.curves import Curve, cost_to, is_early, table
from moejax.sweep.laws.law import Floats

FEW_SEEDS = 5
"""With fewer seeds, a bootstrap interval is narrower than its nominal level."""


AT_LEAST, AT_MOST, UNKNOWN = "at least", "at most", "unknown"
"""Kinds of bound, if a side passes the target before its first point: the variant, the
baseline, or both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speedup:
  """A ratio of costs to the same loss, with its interval."""

  ratio: float
  """Baseline over variant; 0 if the variant does not reach the loss."""
  low: float
  high: float
  """Infinite if the data give no bound; nan, like `low`, without an interval."""
  level: float
  how: str
  """Method of the interval."""
  target: float
  """The loss that both reach; by default of `to_quality`, the mean over seeds of the loss
  with which the baseline ends."""
  notes: tuple[str, ...] = ()
  bound: str = ""
  """AT_LEAST, AT_MOST or UNKNOWN if `ratio` is only a bound; "" if it is a value."""


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

  Both were trained with the same C. By L = l_inf + a C^-alpha, the baseline reaches the
  variant's loss at that multiple of C, since a = (L_baseline - l_inf) C^alpha. The ratio
  in time also divides by the variant's loss of throughput.

  Args:
    baseline: loss of the baseline.
    variant: loss of the variant.
    l_inf: irreducible loss under the evaluation that gave both losses.
    alpha: exponent of the baseline's law, above 0.
    baseline_speed: FLOPs (or tokens, if C counts tokens) per second; 1 for both ignores
      time.
    variant_speed: the same for the variant.

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
    l_inf: as for `effective`.
    alpha: as for `effective`; its error is not part of the interval.
    speed_ratio: throughput of the variant over the baseline's.
    level: of the interval.
    num_draws: bootstrap samples.
    seed: of the bootstrap.

  Raises:
    UserError: as for `effective`.
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
  is the C at which the line has the variant's loss. Its interval is that of an inverse
  regression (Fieller), with Student's t of n - 2 degrees of freedom. It takes the scatter
  of the baseline's runs around the line, including lack of fit, as the error of every
  run, also of the variant.

  Args:
    compute: [n] training FLOPs of the baseline's runs, n >= 3.
    loss: [n] their losses.
    variant_compute: C of the variant.
    variant_loss: its loss, from the same evaluation.
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
    notes.append("the baseline's slope cannot be distinguished from 0: no upper bound")
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


def to_quality(
  baseline: Sequence[Curve],
  variant: Sequence[Curve],
  *,
  target: float | None = None,
  level: float = 0.9,
) -> Speedup:
  """Returns the baseline's cost to reach a loss, over the variant's.

  The ratio is that of the smoothed means over seeds. Its interval is Student's t of
  ln(ratio). With equally many seeds on both sides, curves at the same position are a
  pair: each variant is compared with its baseline at the loss with which that baseline
  ends, so that effects of a seed on both sides cancel. (Pairs of unrelated seeds are as
  good as any others.) With unequal numbers, each side in turn varies against the other's
  mean, with Welch's degrees of freedom.

  A seed that never reaches the loss, or reaches it before its first point, gives only a
  bound; the interval then has no end on that side (low 0, or high inf).

  Args:
    baseline: a curve per seed.
    variant: a curve per seed, with cost in the same unit; in the order of the baseline's
      seeds if both have the same.
    target: nats per token; None is the mean over seeds of the baseline's last loss.
    level: of the interval.

  Raises:
    UserError: no curve, a curve that is not increasing in cost or has unusable numbers,
      seeds without common costs, or a target that the baseline does not reach.
  """
  sides = [table(baseline, "baseline"), table(variant, "variant")]
  slow, fast = (Curve(cost=c, loss=losses.mean(axis=0)) for c, losses in sides)
  goal = float(slow.loss[-1]) if target is None else target
  ratio = _ratio(slow, fast, goal)
  notes, (low, high), how = [], (math.nan, math.nan), "no interval"
  if ratio == 0:
    most = cost_to(slow, goal) / fast.cost[-1]
    notes.append(f"the variant never reaches {goal:.4g}: its speedup is below {most:.3g}")
  elif fast.loss[-1] > goal:
    notes.append(f"the variant passes {goal:.4g} and ends above it, {fast.loss[-1]:.4g}")
  if min(len(losses) for _, losses in sides) < 2:
    notes.append("one seed: no interval")
  else:
    logs = log_ratios.of_seeds(sides, target)
    freedom, reach = log_ratios.reach(logs, level)
    how = f"Student t of the log ratio, {freedom:.3g} degrees of freedom"
    low, high = log_ratios.ends(logs, ratio, reach)
    notes += log_ratios.in_words(logs)
  return Speedup(
    ratio=ratio,
    low=low,
    high=high,
    level=level,
    how=how,
    target=goal,
    notes=tuple(notes),
    bound=_bound(slow, fast, goal),
  )


def _bound(slow: Curve, fast: Curve, target: float) -> str:
  baseline, variant = is_early(slow, target), is_early(fast, target)
  if baseline and variant:
    return UNKNOWN
  return AT_LEAST if variant else AT_MOST if baseline else ""


def _ratio(baseline: Curve, variant: Curve, target: float) -> float:
  """Returns the ratio of costs; 0 if the variant does not reach the target."""
  ours, theirs = cost_to(variant, target), cost_to(baseline, target)
  if not math.isfinite(theirs):
    raise UserError(f"target={target:g}: the baseline never reaches this loss.")
  if not math.isfinite(ours):
    return 0.0
  if ours <= 0:
    raise UserError("The variant reaches the target at cost 0; count from the start.")
  return theirs / ours


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
