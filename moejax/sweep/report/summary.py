"""Groups runs that differ only in their seed into settings, and compares settings.

Only finished runs with a finite loss count. The spread is that of seeds alone: the text,
the held-out tokens and the code are the same. Two settings are compared over the seeds
that both have, since a seed fixes the order of the data for both. An interval is
Student's t over those differences, at 90%, and needs two seeds.

Source of the intervals: W. S. Gosset, "The probable error of a mean", Biometrika 6
(1908).
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moejax.options import show
from moejax.sweep.report.records import Record, Records

LEVEL = 0.9
"""Coverage of every interval."""

_SAME_COST = 1.01
"""Costs within this ratio are equal: runs matched in FLOPs agree to 1%."""

STEP_TIME = "step_ms_p50"
COSTS = {STEP_TIME: "step time", "training_flops": "training FLOPs"}
"""Columns that a loss is weighed against."""

_STEADY = 1.5
"""Seeds of one setting do the same work. If their step times differ by more than this
ratio, the machine was busy with something else, and settings are not compared by them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
  """An estimate with its interval; `low` and `high` are None with one seed."""

  estimate: float
  low: float | None = None
  high: float | None = None
  n: int = 1
  """Number of seeds."""

  @property
  def certain(self) -> bool:
    """Whether the interval excludes 0."""
    return self.low is not None and self.high is not None and self.low * self.high > 0


def student(values: Sequence[float]) -> Interval:
  """Returns the mean of a sample with its interval.

  Args:
    values: at least one number.
  """
  mean, n = float(np.mean(values)), len(values)
  if n < 2:
    return Interval(estimate=mean)
  # scipy.stats takes a second to import.
  from scipy import special

  quantile = float(special.stdtrit(n - 1, (1 + LEVEL) / 2))
  half = quantile * float(np.std(values, ddof=1)) / math.sqrt(n)
  return Interval(estimate=mean, low=mean - half, high=mean + half, n=n)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """Finished runs that are equal up to their seed."""

  values: Mapping[str, Any]
  """Field to value; a field of another router is absent."""
  runs: tuple[Record, ...]
  """In order of their seeds; each has a loss."""
  label: str
  """Readable: `num_experts=8, capacity_factor=1.25`."""
  diverged: tuple[int, ...] = ()
  """Seeds whose run is done without a finite loss, ascending."""

  @functools.cached_property
  def losses(self) -> dict[int, float]:
    """Final held-out loss by seed, nats per token."""
    return {run.values["seed"]: run.values["loss"] for run in self.runs}

  @property
  def n(self) -> int:
    return len(self.runs)

  @functools.cached_property
  def mean(self) -> float:
    return float(np.mean(list(self.losses.values())))

  @functools.cached_property
  def sd(self) -> float | None:
    """Standard deviation over seeds (n - 1 in the denominator); None with one."""
    return float(np.std(list(self.losses.values()), ddof=1)) if self.n > 1 else None

  @property
  def se(self) -> float | None:
    """Standard error of the mean; None with one seed."""
    return None if self.sd is None else self.sd / math.sqrt(self.n)

  @functools.cached_property
  def interval(self) -> Interval:
    return student(list(self.losses.values()))

  def of(self, column: str) -> float | None:
    """Returns a column's mean over seeds; None unless every run has it."""
    found = [run.values.get(column) for run in self.runs]
    if any(not isinstance(value, int | float) for value in found):
      return None
    return float(np.mean(np.asarray(found, np.float64)))


def settings(records: Records) -> tuple[Setting, ...]:
  """Groups finished runs by their setting, in the order of axes."""
  names = short_names(records.fields)
  groups: dict[Any, list[Record]] = {}
  for run in records.runs:
    if run.done and has_loss(run):
      groups.setdefault(tuple(run.settings.items()), []).append(run)
  bad: dict[Any, list[int]] = {}
  for run in diverged(records):
    bad.setdefault(tuple(run.settings.items()), []).append(run.values["seed"])
  found = [
    Setting(
      values=dict(key),
      runs=tuple(sorted(runs, key=lambda run: run.values["seed"])),
      label=label(dict(key), names),
      diverged=tuple(sorted(bad.get(key, ()))),
    )
    for key, runs in groups.items()
  ]
  return tuple(sorted(found, key=lambda s: position(s.values, records.fields)))


def has_loss(run: Record) -> bool:
  """Returns whether a run has a finite held-out loss."""
  return isinstance(run.values.get("loss"), int | float)


def diverged(records: Records) -> list[Record]:
  """Returns the runs that are done without a finite held-out loss."""
  return [run for run in records.runs if run.done and not has_loss(run)]


def label(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
  """Returns a setting in words; `the setting` if runs differ in nothing but seeds."""
  words = [f"{names[field]}={short(v)}" for field, v in values.items() if field in names]
  return ", ".join(words) or "the setting"


def short(value: Any) -> str:
  """Returns a value as on the command line, floats without trailing zeros."""
  return f"{value:g}" if isinstance(value, float) else show(value)


def short_names(fields: Iterable[str]) -> dict[str, str]:
  """Returns each field's last part, or its whole name where two would be equal."""
  fields = tuple(fields)
  leaves = [field.rpartition(".")[2] for field in fields]
  return {f: f if leaves.count(n) > 1 else n for f, n in zip(fields, leaves, strict=True)}


def position(values: Mapping[str, Any], fields: Sequence[str]) -> tuple[Any, ...]:
  """Returns a sort key: field by field, each as `order`; absent ones first."""
  return tuple(order(values[f]) if f in values else (-1, 0.0, "") for f in fields)


def order(value: Any) -> tuple[int, float, str]:
  """Returns a value's sort key: numbers ascending, then none, then words."""
  if isinstance(value, bool):
    return 0, float(value), ""
  if isinstance(value, int | float):
    return 0, float(value), ""
  return (1, 0.0, "") if value is None else (2, 0.0, str(value))


def axes(found: Sequence[Setting], fields: Sequence[str]) -> tuple[str, ...]:
  """Returns the fields that were varied, without those that follow from them.

  An expert's width solved for equal FLOPs follows from the number of experts: it is no
  axis of its own.

  Args:
    found: settings.
    fields: those that differ, the most important first.
  """
  kept: list[str] = []
  for field in fields:
    seen: dict[Any, set[str]] = {}
    for setting in found:
      key = tuple(show(setting.values.get(name)) for name in kept)
      seen.setdefault(key, set()).add(show(setting.values.get(field)))
    if any(len(values) > 1 for values in seen.values()):
      kept.append(field)
  return tuple(kept)


def paired(a: Setting, b: Setting) -> Interval | None:
  """Returns b's loss minus a's over their common seeds; None if they share no seed."""
  seeds = sorted(a.losses.keys() & b.losses.keys())
  return student([b.losses[s] - a.losses[s] for s in seeds]) if seeds else None


def ranked(found: Sequence[Setting]) -> Sequence[Setting]:
  """Returns the settings that have every seed that any of them has.

  A mean over fewer seeds is a mean over another draw of the data, and the spread between
  seeds can exceed the differences between settings. If no setting has all seeds, returns
  all settings.
  """
  return with_all_seeds(found) or found


def with_all_seeds(found: Sequence[Setting]) -> list[Setting]:
  """Returns the settings that have every seed that any of them has; maybe none."""
  seeds = all_seeds(found)
  return [s for s in found if seeds == s.losses.keys()]


def all_seeds(found: Iterable[Setting]) -> frozenset[int]:
  """Returns the seeds for which any setting has a finite loss."""
  return frozenset[int]().union(*(setting.losses for setting in found))


def best(found: Sequence[Setting]) -> Setting:
  """Returns the setting with the lowest mean loss among those `ranked`; at least one."""
  return min(ranked(found), key=lambda setting: setting.mean)


def costs(found: Sequence[Setting]) -> list[str]:
  """Returns the costs that differ between these settings."""
  return [
    cost
    for cost in COSTS
    if varies(found, cost) and (cost != STEP_TIME or is_steady(found))
  ]


def indistinguishable(found: Sequence[Setting], best: Setting) -> list[Setting]:
  """Returns the settings whose difference from the best has an interval around 0."""
  out = []
  for setting in found:
    gap = paired(best, setting) if setting is not best else None
    if gap is not None and gap.n > 1 and not gap.certain:
      out.append(setting)
  return out


def varies(found: Iterable[Setting], cost: str) -> bool:
  """Returns whether settings differ in a cost by more than 1%."""
  prices = [price for s in found if (price := s.of(cost)) is not None]
  return len(prices) > 1 and max(prices) > _SAME_COST * min(prices)


def is_steady(found: Iterable[Setting]) -> bool:
  """Returns whether step times can be compared between settings."""
  return unsteadiness(found) <= _STEADY


def unsteadiness(found: Iterable[Setting]) -> float:
  """Returns the largest ratio of step times between seeds of one setting; at least 1."""
  most = 1.0
  for setting in found:
    times = [run.values.get(STEP_TIME) for run in setting.runs]
    known = [time for time in times if isinstance(time, int | float) and time > 0]
    most = max(most, max(known) / min(known)) if known else most
  return most


def pareto(found: Sequence[Setting], cost: str) -> list[Setting]:
  """Returns the settings that no other beats in loss at equal or lower cost.

  Args:
    found: settings; those without the cost are left out.
    cost: a column, such as `step_ms_p50`.

  Returns:
    Settings among those `ranked`, ascending in cost, descending in mean loss; all of an
    exact tie.
  """
  priced = [(price, s) for s in ranked(found) if (price := s.of(cost)) is not None]
  front: list[tuple[float, Setting]] = []
  for price, setting in sorted(priced, key=lambda pair: (pair[0], pair[1].mean)):
    last = (front[-1][0], front[-1][1].mean) if front else (price, math.inf)
    if setting.mean < last[1] or (price, setting.mean) == last:
      front.append((price, setting))
  return [setting for _, setting in front]
