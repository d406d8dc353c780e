"""Analyses of a sweep's settings: effects, capacity, doubling of experts, isoFLOP.

Every result is computed from means over seeds, with an interval from the same quantity
computed seed by seed. There is no result if the settings do not support one: a grid with
holes, one capacity factor, a minimum on the edge.

Letters: E experts, K choices, N parameters, C training FLOPs.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moejax.sweep.report import records, summary
from moejax.sweep.report.summary import Interval, Setting

EXPERTS, CAPACITY = "moe.num_experts", "moe.capacity_factor"

SIZES = frozenset(
  (
    *(f"model.{n}" for n in ("width", "num_layers", "num_heads", "num_kv_heads")),
    *("model.head_dim", "model.hidden", "moe.hidden", "moe.shared_hidden"),
    "train.num_steps",
  )
)
"""Fields that make a model larger or its training longer at the same budget."""

SAME_BUDGET = 1.03
"""Runs whose training FLOPs are within this ratio have the same budget; each was solved
to 1% of it."""

MIN_SIZES = 3
"""Number of sizes that a quadratic needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
  """The effect of one level of an axis on the loss, against the mean of all levels."""

  axis: str
  level: Any
  effect: Interval
  """Nats per token."""
  cells: int
  """Number of combinations of the other axes that it is averaged over."""


def main_effects(found: Sequence[Setting], axes: Sequence[str]) -> list[Effect]:
  """Returns the main effects of each axis, balanced over the other axes.

  For each combination of the other axes that has a setting at every level, the effect
  of a level is its loss minus the mean over levels; these are averaged with equal
  weights. Combinations with a hole are left out, so that no level benefits from better
  values of the other axes. The interval is computed from that average seed by seed, over
  the seeds that all of these settings have. An axis without a complete combination has no
  effects.
  """
  out = []
  for axis in axes:
    levels = _levels(found, axis)
    complete = [
      cell for cell in cells(found, axes, axis).values() if len(cell) == len(levels)
    ]
    if len(levels) < 2 or not complete:
      continue
    samples = _effects_by_seed(complete, len(levels))
    out += [
      Effect(
        axis=axis,
        level=level,
        effect=summary.student(samples[:, i].tolist()),
        cells=len(complete),
      )
      for i, level in enumerate(levels)
    ]
  return out


def _effects_by_seed(complete: Sequence[list[Setting]], levels: int) -> np.ndarray:
  """Returns effects [seeds, levels]; one row of means if no seed is common to all."""
  seeds = _common_seeds(setting for cell in complete for setting in cell)

  def losses(setting: Setting) -> list[float]:
    return [setting.losses[s] for s in seeds] if seeds else [setting.mean]

  # [cells, levels, seeds]
  table = np.asarray([[losses(setting) for setting in cell] for cell in complete])
  assert table.shape[1] == levels
  return (table - table.mean(axis=1, keepdims=True)).mean(axis=0).T


def _levels(found: Iterable[Setting], axis: str) -> list[Any]:
  values = [s.values[axis] for s in found if axis in s.values]
  distinct = [v for i, v in enumerate(values) if v not in values[:i]]
  return sorted(distinct, key=summary.order)


def cells(
  found: Iterable[Setting], axes: Sequence[str], axis: str
) -> dict[Any, list[Setting]]:
  """Groups settings by the other axes; each group ascends along `axis`."""
  out: dict[Any, list[Setting]] = {}
  for setting in found:
    if axis in setting.values:
      out.setdefault(key_without(setting, axes, axis), []).append(setting)
  for cell in out.values():
    cell.sort(key=lambda s: summary.order(s.values[axis]))
  return out


def key_without(setting: Setting, axes: Sequence[str], *left_out: str) -> tuple[Any, ...]:
  """Returns (axis, value) pairs of the other axes, for grouping."""
  return key_of(setting.values, axes, *left_out)


def key_of(values: Mapping[str, Any], axes: Sequence[str], *left_out: str) -> tuple:
  """Returns (axis, value) pairs of the other axes of a setting's values."""
  names = (axis for axis in axes if axis not in left_out)
  return tuple((n, values[n]) for n in names if n in values)


def _common_seeds(found: Iterable[Setting]) -> list[int]:
  seeds = [set(setting.losses) for setting in found]
  return sorted(set.intersection(*seeds)) if seeds else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doubling:
  """The effect of doubling the number of experts."""

  others: Mapping[str, Any]
  experts: int
  """E before."""
  difference: Interval
  """Loss with 2E minus loss with E; nats per token."""
  step_ms: float | None
  """The step time at which both are compared; None if they are compared directly."""
  also: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
  """Other fields that change with E, because they were varied with it or solved for it:
  field to its values at E and 2E."""
  slower: float | None = None
  """Without a common step time: the step time of 2E over that of E, minus 1; None if
  step times are not steady."""


def doublings(found: Sequence[Setting], axes: Sequence[str]) -> list[Doubling]:
  """Returns the effects of doubling E, at equal step time if possible.

  Along the capacity factors of one E, the loss is interpolated linearly in log step
  time, seed by seed; E and 2E are compared at the geometric middle of the range of step
  times that both cover. Without such a range, settings that differ only in E are
  compared directly, with their difference in step time.
  """
  if EXPERTS not in axes:
    return []
  is_steady = summary.is_steady(found)
  curves: dict[Any, dict[int, list[Setting]]] = {}
  for setting in found:
    if EXPERTS in setting.values:
      key = key_without(setting, axes, EXPERTS, CAPACITY)
      curves.setdefault(key, {}).setdefault(setting.values[EXPERTS], []).append(setting)
  out = []
  for key, by_experts in curves.items():
    for experts in sorted(by_experts):
      if 2 * experts in by_experts:
        pair = by_experts[experts], by_experts[2 * experts]
        timed = is_steady and all(s.of("step_ms_p50") for side in pair for s in side)
        equal = _at_equal_time(dict(key), experts, *pair) if timed else []
        out += equal or _as_they_are(dict(key), experts, *pair, timed=timed)
  return out


def _times(curve: Sequence[Setting]) -> np.ndarray:
  return np.log([setting.of("step_ms_p50") or math.nan for setting in curve])


def _at_equal_time(
  others: Mapping[str, Any], experts: int, few: list[Setting], many: list[Setting]
) -> list[Doubling]:
  few, many = (sorted(c, key=lambda s: s.of("step_ms_p50") or 0) for c in (few, many))
  seeds = _common_seeds([*few, *many])
  low = max(_times(few)[0], _times(many)[0])
  high = min(_times(few)[-1], _times(many)[-1])
  if not seeds or not low < high:
    return []
  at = (low + high) / 2

  def read(curve: Sequence[Setting], seed: int) -> float:
    return float(np.interp(at, _times(curve), [s.losses[seed] for s in curve]))

  values = [read(many, seed) - read(few, seed) for seed in seeds]
  return [
    Doubling(
      others=others,
      experts=experts,
      difference=summary.student(values),
      step_ms=math.exp(at),
      also=_also(few[0], many[0], others),
    )
  ]


def _also(a: Setting, b: Setting, others: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields in which two settings differ, except E, capacity and `others`."""
  known = {EXPERTS, CAPACITY, records.VARIANT, *others}
  return {
    field: (a.values[field], b.values[field])
    for field in a.values
    if field in b.values and field not in known and a.values[field] != b.values[field]
  }


def _as_they_are(
  others: Mapping[str, Any],
  experts: int,
  few: list[Setting],
  many: list[Setting],
  *,
  timed: bool,
) -> list[Doubling]:
  out = []
  for a in few:
    for b in many:
      difference = summary.paired(a, b)
      if a.values.get(CAPACITY) != b.values.get(CAPACITY) or difference is None:
        continue
      same = {CAPACITY: a.values[CAPACITY]} if CAPACITY in a.values else {}
      ratio = math.exp(_times([b])[0] - _times([a])[0])
      out.append(
        Doubling(
          others={**others, **same},
          experts=experts,
          difference=difference,
          step_ms=None,
          also=_also(a, b, others),
          slower=ratio - 1 if timed else None,
        )
      )
  return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class IsoFlop:
  """Loss against active parameters at one budget, with a quadratic in log10 N."""

  others: Mapping[str, Any]
  budget: float
  """Mean training FLOPs of its runs."""
  sizes: tuple[float, ...]
  """Active parameters, ascending."""
  losses: tuple[float, ...]
  """Means over seeds."""
  coefficients: tuple[float, float, float]
  """Coefficients of 1, x and x^2, with x = log10 N."""
  minimum: Interval | None
  """N of the lowest loss; None if refused."""
  loss: float | None
  """Value of the quadratic at its minimum."""
  refused: str
  """Why there is no minimum; empty if there is one."""


def isoflops(found: Sequence[Setting], fields: Sequence[str]) -> list[IsoFlop]:
  """Returns a curve for each budget and combination of fields other than sizes.

  A curve needs three sizes within `SAME_BUDGET`. Its minimum is refused if the quadratic
  opens downward, if its vertex is not strictly between the sizes, or if the lowest loss
  was measured at the smallest or largest of them, since the grid is then too narrow.
  """
  groups: dict[Any, list[Setting]] = {}
  for setting in found:
    key = key_without(setting, fields, *SIZES)
    groups.setdefault(key, []).append(setting)
  curves = []
  for key, group in groups.items():
    for same in _budgets(group):
      if len({setting.of("active_parameters") for setting in same}) >= MIN_SIZES:
        curves.append(_isoflop(dict(key), same))
  return sorted(curves, key=lambda c: (summary.position(c.others, fields), c.budget))


def _budgets(group: Iterable[Setting]) -> list[list[Setting]]:
  out: list[list[Setting]] = []
  for setting in sorted(group, key=lambda s: s.of("training_flops") or 0):
    cost = setting.of("training_flops") or 0
    if not out or cost > SAME_BUDGET * (out[-1][0].of("training_flops") or 0):
      out.append([])
    out[-1].append(setting)
  return out


def _isoflop(others: Mapping[str, Any], same: list[Setting]) -> IsoFlop:
  same = sorted(same, key=lambda s: s.of("active_parameters") or 0)
  sizes = np.asarray([s.of("active_parameters") or math.nan for s in same])
  losses = np.asarray([s.mean for s in same])
  x = np.log10(sizes)
  c0, c1, c2 = _quadratic(x, losses)
  vertex, refused = _vertex(x, losses, (c0, c1, c2))
  seeds = _common_seeds(same)
  by_seed = [np.asarray([s.losses[seed] for s in same]) for seed in seeds]
  each = [_vertex(x, values, _quadratic(x, values))[0] for values in by_seed]
  minimum = loss = None
  if vertex is not None:
    # A seed without a minimum cannot be part of a mean of minima.
    known = [v for v in each if v is not None]
    spread = summary.student(known) if known and len(known) == len(each) else None
    low, high = (spread.low, spread.high) if spread else (None, None)
    minimum = Interval(
      estimate=10**vertex,
      low=None if low is None else 10**low,
      high=None if high is None else 10**high,
      n=len(seeds),
    )
    loss = float(c0 + c1 * vertex + c2 * vertex**2)
  return IsoFlop(
    others=others,
    budget=float(np.mean([s.of("training_flops") or math.nan for s in same])),
    sizes=tuple(sizes.tolist()),
    losses=tuple(losses.tolist()),
    coefficients=(c0, c1, c2),
    minimum=minimum,
    loss=loss,
    refused=refused,
  )


def _quadratic(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
  fitted = np.polynomial.Polynomial.fit(x, y, 2).convert().coef
  c0, c1, c2 = np.pad(fitted, (0, 3 - len(fitted))).tolist()
  return c0, c1, c2


def _vertex(
  x: np.ndarray, y: np.ndarray, coefficients: tuple[float, float, float]
) -> tuple[float | None, str]:
  """Returns log10 N of the minimum, or None and the reason why it is refused."""
  _, c1, c2 = coefficients
  best = int(np.argmin(y))
  if best in (0, len(x) - 1):
    side = "smallest" if best == 0 else "largest"
    return None, f"the lowest loss is at the {side} size tried: add sizes beyond it"
  if c2 <= 0:
    return None, "the quadratic has no minimum: add sizes or seeds"
  vertex = -c1 / (2 * c2)
  if not x[0] < vertex < x[-1]:
    return None, "the quadratic's minimum is outside the sizes tried: add sizes there"
  return vertex, ""
