"""When a sparse setting reaches the final loss of its dense twin.

This is the question of Switch Transformers (arXiv:2101.03961, section 3.1, figure 5),
answered for every sweep that has both sides: settings with `moe.dense_twin`, and settings
without. Each side may be tuned; every sparse setting is compared with the dense twin with
the lowest final loss.

Losses come from the evaluations during training, so `train.eval_every` is the resolution.
With a decaying learning rate, every loss before the end is higher than that of a run that
ends there. So the steps that an early stop would save can only be measured with a run of
that length.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence

import numpy as np

from moejax.sweep.laws import speedup as laws
from moejax.sweep.laws.speedup import Curve, Speedup
from moejax.sweep.report import summary
from moejax.sweep.report.summary import Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """A sparse setting against the best dense twin; ratios are baseline over setting."""

  setting: Setting
  baseline: Setting
  steps: Speedup
  flops: Speedup
  time: Speedup | None
  """None without a step time on both sides."""


def speedups(found: Sequence[Setting]) -> list[Answer]:
  """Returns an answer per sparse setting; empty if one side is missing."""
  baseline = best_twin(found)
  if baseline is None:
    return []
  is_steady, out = summary.is_steady(found), []
  for setting in comparable(found, baseline):
    slow, fast = pair(baseline, setting)
    steps = laws.to_quality(slow, fast, level=summary.LEVEL)
    # A cost per step is constant for a setting, so it scales ratio and interval.
    flops = _scaled(steps, _per_step(baseline, setting, "training_flops", "steps"))
    ratio = _per_step(baseline, setting, summary.STEP_TIME, None) if is_steady else None
    time = None if ratio is None else _scaled(steps, ratio)
    if flops is not None:
      out.append(
        Answer(setting=setting, baseline=baseline, steps=steps, flops=flops, time=time)
      )
  return out


def best_twin(found: Sequence[Setting]) -> Setting | None:
  """Returns the dense twin with the lowest final loss of evaluations during training."""
  twins = [s for s in found if is_twin(s) and curves(s)]
  return summary.best(twins) if twins else None


def comparable(found: Sequence[Setting], baseline: Setting) -> list[Setting]:
  """Returns the sparse settings whose curves can be compared with the baseline's."""
  slow = curves(baseline)
  sparse = [(s, curves(s)) for s in found if not is_twin(s)]
  return [s for s, fast in sparse if fast and _comparable(slow, fast)]


def left_out(found: Sequence[Setting]) -> list[Setting]:
  """Returns the sparse settings whose curves cannot be compared with the baseline's."""
  baseline = best_twin(found)
  if baseline is None:
    return []
  sparse = [s for s in found if not is_twin(s) and any(s.runs[0].curve.eval_step)]
  kept = comparable(found, baseline)
  return [s for s in sparse if not any(s is other for other in kept)]


def is_twin(setting: Setting) -> bool:
  return setting.runs[0].config.moe.dense_twin


def curves(setting: Setting, seeds: Collection[int] | None = None) -> list[Curve]:
  """Returns the held-out loss of each seed over steps; empty with one point or none.

  Args:
    setting: runs that are equal up to their seed.
    seeds: seeds to include; None means all.
  """
  found = [
    Curve(
      cost=np.asarray(run.curve.eval_step, np.float64),
      loss=np.asarray(run.curve.eval_loss, np.float64),
    )
    for run in setting.runs
    if seeds is None or run.values["seed"] in seeds
  ]
  return found if all(len(curve.cost) > 1 for curve in found) else []


def pair(a: Setting, b: Setting) -> tuple[list[Curve], list[Curve]]:
  """Returns the curves of both settings' common seeds; of all seeds if none is common."""
  seeds = a.losses.keys() & b.losses.keys() or None
  return curves(a, seeds), curves(b, seeds)


def in_words(answers: Sequence[Answer]) -> str:
  """Returns a sentence on the setting that reaches the loss in the fewest steps.

  Args:
    answers: at least one.
  """
  ranked = summary.ranked([answer.setting for answer in answers])
  best = max(
    (answer for answer in answers if any(answer.setting is s for s in ranked)),
    key=lambda answer: answer.steps.ratio,
  )
  target = f"({best.steps.target:.4f}, {best.baseline.label})"
  if not best.steps.ratio:
    return f"No setting reaches the held-out loss at which the dense twin ends {target}."
  costs = [f"{_ratio(best.steps)} fewer steps", f"{_ratio(best.flops)} fewer FLOPs"]
  if best.time is not None:
    costs.append(f"{_ratio(best.time)} less time")
  return (
    f"{best.setting.label} reaches the held-out loss at which the best dense twin ends "
    f"{target} with {', '.join(costs)} (below 1x is more).{_diverged(best)}"
  )


def _diverged(answer: Answer) -> str:
  sides = (answer.setting, answer.baseline)
  lost = [f"{s.label} ({len(s.diverged)} diverged)" for s in sides if s.diverged]
  return f" Seeds without a finite loss do not count: {'; '.join(lost)}." if lost else ""


def _ratio(speedup: Speedup) -> str:
  ratio = f"{speedup.bound} {speedup.ratio:.2f}x".lstrip()
  if speedup.bound:
    return f"{ratio} (a side reached it before its first evaluation: evaluate more often)"
  if math.isnan(speedup.low):
    return f"{ratio} (one seed)"
  return f"{ratio} ({speedup.level:.0%} interval {speedup.low:.2f} to {speedup.high:.2f})"


def finite(value: float) -> float | None:
  """Returns a number for a table; None if it is not finite."""
  return value if math.isfinite(value) else None


def _comparable(slow: Sequence[Curve], fast: Sequence[Curve]) -> bool:
  """Returns whether all seeds of each side were evaluated at the same steps."""
  sides = (slow, fast)
  return all(np.array_equal(side[0].cost, c.cost) for side in sides for c in side)


def _per_step(
  baseline: Setting, setting: Setting, cost: str, per: str | None
) -> float | None:
  """Returns the baseline's cost per step over the setting's."""
  values = []
  for side in (baseline, setting):
    total, steps = side.of(cost), 1.0 if per is None else side.of(per)
    if not total or not steps:
      return None
    values.append(total / steps)
  return values[0] / values[1]


def _scaled(steps: Speedup, factor: float | None) -> Speedup | None:
  if factor is None:
    return None
  return dataclasses.replace(
    steps,
    ratio=steps.ratio * factor,
    low=steps.low * factor,
    high=steps.high * factor,
  )
