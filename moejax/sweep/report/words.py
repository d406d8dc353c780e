"""Wording of numbers that the sentences of a report share."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.sweep.report import analyses, summary
from moejax.sweep.report.summary import Interval, Setting

_MOST = 8
"""Most settings named in one sentence; the figures and tables have all."""


def listed(items: Sequence[str]) -> str:
  """Returns the first few words or settings, and how many more there are."""
  more = f"; and {len(items) - _MOST} more" if len(items) > _MOST else ""
  return "; ".join(items[:_MOST]) + more


def spread(setting: Setting) -> str:
  """Returns a mean loss with its standard error, if there is one."""
  if setting.se is None:
    return f"{setting.mean:.4f}"
  return f"{setting.mean:.4f} ± {setting.se:.4f}"


def difference(interval: Interval) -> str:
  """Returns a difference in loss with its interval and number of seeds."""
  if interval.n > 1 and interval.low == interval.high == 0:
    return f"no difference in any of {interval.n} seeds"
  text = f"{interval.estimate:+.4f} nats/token"
  if interval.low is None or interval.high is None:
    return f"{text} (one seed)"
  return (
    f"{text} ({summary.LEVEL:.0%} interval {interval.low:+.4f} to {interval.high:+.4f}, "
    f"{interval.n} seeds)"
  )


def where(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
  """Returns `, with top_k=2` for the axes held fixed; empty if there is none."""
  return f", with {summary.label(values, names)}" if values else ""


def doubling(doubling: analyses.Doubling, names: Mapping[str, str]) -> tuple[str, str]:
  """Returns the comparison in words, and an addition about the step time."""
  what = f"from {doubling.experts} to {2 * doubling.experts} experts"
  if doubling.also:
    changed = (
      f"{names.get(field, field)} from {summary.short(a)} to {summary.short(b)}"
      for field, (a, b) in doubling.also.items()
    )
    what += f" (and {', '.join(changed)})"
  if doubling.step_ms is not None:
    what += f" at equal step time ({doubling.step_ms:,.4g} ms, interpolated)"
  slower = ""
  if doubling.slower is not None:
    slower = f", and the step time by {doubling.slower:+.0%}"
  return what + where(doubling.others, names), slower


def seeds_of(setting: Setting) -> str:
  """Returns the number of seeds, and how many more ended without a finite loss."""
  lost = f", {len(setting.diverged)} more diverged" if setting.diverged else ""
  return count(setting.n, "seed") + lost


def all_seeds(found: Sequence[Setting]) -> str:
  """Returns ` with all 3 seeds` if some setting lacks a seed; empty otherwise."""
  if len(summary.with_all_seeds(found)) == len(found):
    return ""
  return f" with {whole(len(summary.all_seeds(found)))}"


def whole(number: int) -> str:
  """Returns `all 3 seeds`, `both seeds`."""
  return "both seeds" if number == 2 else f"all {count(number, 'seed')}"


def count(number: int, noun: str) -> str:
  """Returns `1 run`, `2 runs`."""
  return f"{number} {noun}{'' if number == 1 else 's'}"
