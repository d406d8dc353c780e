"""The capacity factor that suffices: as good as dropless, with fewer slots."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moejax.sweep.report import analyses, summary
from moejax.sweep.report.analyses import CAPACITY
from moejax.sweep.report.summary import Setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
  """The capacity factor that suffices, for one combination of the other axes."""

  others: Mapping[str, Any]
  dropless: Setting | None
  """None if none was tried."""
  sufficient: Setting | None
  """The setting with the smallest factor that is within `margin` of dropless, like every
  larger one tried; None if there is none."""
  largest: float
  """The largest factor that was tried."""
  margin: float | None
  """One standard error of the dropless loss; None with one seed or none."""
  refused: str = ""
  """Why `sufficient`, or factors below it, could not be judged; empty if they were."""


def sufficient(
  found: Sequence[Setting],
  axes: Sequence[str],
  diverged: Iterable[Mapping[str, Any]] = (),
) -> list[Capacity]:
  """Returns the sufficient capacity factor for each combination of the other axes.

  It is the smallest factor whose loss is within one standard error of dropless, over
  their common seeds. A larger factor that fails disqualifies the smaller ones, whose loss
  is then luck. A factor also fails if one of its seeds diverged.

  Args:
    found: settings.
    axes: the fields that were varied.
    diverged: the settings of each run that is done without a finite loss.
  """
  if CAPACITY not in axes:
    return []
  bad: dict[Any, set[Any]] = {}
  for values in diverged:
    if CAPACITY in values:
      bad.setdefault(analyses.key_of(values, axes, CAPACITY), set()).add(values[CAPACITY])
  out = []
  for key, cell in analyses.cells(found, axes, CAPACITY).items():
    dropless = next((s for s in cell if s.values[CAPACITY] is None), None)
    bounded = {s.values[CAPACITY]: s for s in cell if s.values[CAPACITY] is not None}
    lost = bad.get(key, set())
    if bounded or lost - {None}:
      out.append(_sufficient(dict(key), dropless, bounded, lost))
  return out


def _sufficient(
  others: Mapping[str, Any],
  dropless: Setting | None,
  bounded: Mapping[float, Setting],
  bad: set[float | None],
) -> Capacity:
  """Compares factors with dropless, from the largest down.

  Args:
    others: see `Capacity`.
    dropless: None if none of its seeds has a finite loss.
    bounded: settings by factor.
    bad: factors with a diverged seed; None is dropless.
  """
  factors = sorted({*bounded, *(f for f in bad if f is not None)})
  margin = None if dropless is None or None in bad else dropless.se
  sufficient = None
  if None in bad:
    refused = "a dropless run diverged"
  elif dropless is None:
    refused = "there is no dropless run (capacity_factor none) to compare with"
  elif margin is None:
    refused = "dropless has one seed, and so no standard error"
  else:
    sufficient, refused = _smallest(dropless, margin, bounded, factors, bad)
  return Capacity(
    others=others,
    dropless=dropless,
    sufficient=sufficient,
    largest=factors[-1],
    margin=margin,
    refused=refused,
  )


def _smallest(
  dropless: Setting,
  margin: float,
  bounded: Mapping[float, Setting],
  factors: Sequence[float],
  bad: set[float | None],
) -> tuple[Setting | None, str]:
  """Returns the setting that suffices, and `Capacity.refused`; `factors` ascend."""
  sufficient = None
  for factor in reversed(factors):
    if factor in bad:
      # Below a sufficient factor, this is an answer: this one does not suffice.
      return sufficient, "" if sufficient else f"a run at {factor:g} diverged"
    gap = summary.paired(dropless, bounded[factor])
    if gap is None:
      return sufficient, f"{factor:g} and dropless have no seed in common"
    if gap.estimate > margin:
      break
    sufficient = bounded[factor]
  return sufficient, ""
