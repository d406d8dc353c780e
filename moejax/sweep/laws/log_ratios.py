"""The interval of a ratio of costs over seeds: Student's t of its logarithm."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from moejax.errors import UserError
from moejax.sweep.laws.curves import Curve, cost_to, is_early
from moejax.sweep.laws.law import Floats


@dataclasses.dataclass(frozen=True)
class LogRatio:
  """ln(baseline's cost / variant's cost) of a pair, or of a seed against the mean."""

  value: float
  never: bool
  """The variant does not reach the loss, so the value is an upper bound."""
  early: bool
  """The variant is there before its first point, so the value is a lower bound."""
  lost: bool
  """The baseline does not reach the loss, so the value is a lower bound."""


def _log_ratio(slow: Curve, fast: Curve, target: float | None) -> LogRatio:
  goal = float(slow.loss[-1]) if target is None else target
  theirs, ours = cost_to(slow, goal), cost_to(fast, goal)
  never, lost = math.isinf(ours), math.isinf(theirs)
  cost = fast.cost[-1] if never else ours
  most = slow.cost[-1] if lost else theirs
  if cost <= 0 or most <= 0:
    raise UserError("A seed reaches the target at cost 0; count from the start.")
  return LogRatio(
    value=math.log(most / cost),
    never=never,
    early=is_early(fast, goal),
    lost=lost,
  )


def of_seeds(
  sides: Sequence[tuple[Floats, Floats]], target: float | None
) -> list[list[LogRatio]]:
  """Returns the pairs as one sample, or a sample for each side that varies."""
  slow, fast = ([Curve(cost=c, loss=loss) for loss in losses] for c, losses in sides)
  if len(slow) == len(fast):
    return [[_log_ratio(b, v, target) for b, v in zip(slow, fast, strict=True)]]
  middle, quick = (Curve(cost=c, loss=losses.mean(axis=0)) for c, losses in sides)
  goal = float(middle.loss[-1]) if target is None else target
  return [
    [_log_ratio(b, quick, target) for b in slow],
    [_log_ratio(middle, v, goal) for v in fast],
  ]


def reach(samples: Sequence[Sequence[LogRatio]], level: float) -> tuple[float, float]:
  """Returns degrees of freedom, and half the interval's width (Welch, of a sum)."""
  parts = [
    (float(np.var([r.value for r in sample], ddof=1)) / len(sample), len(sample) - 1)
    for sample in samples
  ]
  squared = sum(error for error, _ in parts)
  if squared == 0:
    return float(sum(freedom for _, freedom in parts)), 0.0
  freedom = squared**2 / sum(error**2 / df for error, df in parts)
  t = float(stats.t.ppf((1 + level) / 2, freedom))
  return freedom, t * math.sqrt(squared)


def ends(
  samples: Sequence[Sequence[LogRatio]], ratio: float, reach: float
) -> tuple[float, float]:
  """Returns the interval; open on a side where some seed gives only a bound."""
  every = [r for sample in samples for r in sample]
  # A ratio of 0 is also a bound: only the bounds of the seeds are left.
  middle = ratio or math.exp(max(np.mean([r.value for r in s]) for s in samples))
  low = 0.0 if any(r.never for r in every) else middle * math.exp(-reach)
  is_open = any(r.early or r.lost for r in every)
  return low, math.inf if is_open else middle * math.exp(reach)


def in_words(samples: Sequence[Sequence[LogRatio]]) -> list[str]:
  """Returns sentences about seeds that give only a bound."""
  every = [r for sample in samples for r in sample]
  kinds = (
    ("never", "never reach the target: no lower bound"),
    ("early", "reach the target before their first evaluation: no upper bound"),
    ("lost", "of the baseline never reach the target: no upper bound"),
  )
  counts = [(sum(getattr(r, kind) for r in every), words) for kind, words in kinds]
  return [f"{count} of {len(every)} seeds {words}" for count, words in counts if count]
