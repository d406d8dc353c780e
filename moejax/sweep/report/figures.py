"""The figures of a report, as Altair charts: only those that the data support.

Error bars are one standard error over seeds unless the caption says otherwise; with one
seed there are none. Curves and fits are in `trends`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from moejax.sweep.report import analyses, charts, quality_curves, summary, trends
from moejax.sweep.report.analyses import CAPACITY, EXPERTS
from moejax.sweep.report.charts import Figure
from moejax.sweep.report.columns import TAIL
from moejax.sweep.report.records import Records
from moejax.sweep.report.summary import Setting

_MOST_COMBINATIONS = 4
_SHAPES = 6
"""Number of symbols that can be distinguished at a glance."""


def make(records: Records, found: Sequence[Setting], axes: Sequence[str]) -> list[Figure]:
  """Returns the figures of a report.

  Args:
    records: all runs.
    found: their settings, from `summary.settings`.
    axes: the fields that were varied, the most important first.
  """
  names = summary.short_names(records.fields)
  out = [loss_against(found, axes, names, cost) for cost in summary.costs(found)]
  out += heat_maps(found, axes, names)
  out += drops(found, axes, names)
  out += trends.curves(found, axes, names)
  out += quality_curves.draw(found)
  out += trends.isoflops(found, records.fields, names)
  out += trends.main_effects(found, axes, names)
  return out


def _row(setting: Setting, axes: Sequence[str]) -> dict[str, Any]:
  """Returns a setting's loss with one standard error, coloured and shaped by axes."""
  row = {"setting": setting.label, "loss": setting.mean, "seeds": setting.n}
  if setting.se is not None:
    row |= {"low": setting.mean - setting.se, "high": setting.mean + setting.se}
  for channel, axis in zip(("colour", "shape"), axes, strict=False):
    row[channel] = _level(setting, axis)
  return row


def _level(setting: Setting, axis: str) -> str:
  return charts.word(axis, setting.values[axis]) if axis in setting.values else "-"


def loss_against(
  found: Sequence[Setting], axes: Sequence[str], names: Mapping[str, str], cost: str
) -> Figure:
  """Draws loss against a cost, with the Pareto front."""
  title = summary.COSTS[cost]
  is_time = cost == summary.STEP_TIME
  rows, prices = [], []
  for setting in found:
    if (price := setting.of(cost)) is not None:
      rows.append(_row(setting, axes) | {"cost": price})
      prices.append(price)
  x = alt.X(
    "cost:Q",
    title=f"{title}, ms" if is_time else title,
    scale=charts.scale(prices),
    axis=alt.Axis(format="~g" if is_time else "~s"),
  )
  scale = alt.Scale(zero=False, nice=False, padding=12)
  base = alt.Chart(charts.data(rows)).encode(x=x)
  points = base.mark_point(size=70, filled=True, opacity=0.9).encode(
    y=alt.Y("loss:Q", title=charts.LOSS, scale=scale),
    tooltip=["setting:N", "loss:Q", "cost:Q", "seeds:Q"],
  )
  bars = base.transform_filter("isValid(datum.low)").mark_rule(opacity=0.8)
  bars = bars.encode(y=alt.Y("low:Q", title=charts.LOSS), y2="high:Q")
  if axes:
    colour = charts.colour(axes[0], charts.levels(found, axes[0]), names)
    points, bars = points.encode(color=colour), bars.encode(color=colour)
  if len(axes) > 1 and 1 < len(levels := charts.levels(found, axes[1])) <= _SHAPES:
    shape = alt.Shape("shape:N", sort=levels, title=names[axes[1]])
    points = points.encode(shape=shape)
  return Figure(
    name="loss_vs_step_time" if is_time else "loss_vs_flops",
    title=f"Loss against {title}",
    caption="Each point is a setting: lower is better, further left is cheaper. The "
    "dashed line joins the Pareto set, the settings that none beats in mean loss at "
    "equal or lower cost. Bars: one standard error over seeds.",
    chart=alt.layer(_front(found, cost), bars, points).properties(height=charts.HEIGHT),
  )


def _front(found: Sequence[Setting], cost: str) -> Any:
  """Returns the Pareto set as a line of steps."""
  rows = [
    {"cost": setting.of(cost), "loss": setting.mean, "order": i}
    for i, setting in enumerate(summary.pareto(found, cost))
  ]
  line = alt.Chart(charts.data(rows)).mark_line(
    interpolate="step-after", strokeDash=[4, 3], color="#888", strokeWidth=1.5
  )
  return line.encode(x="cost:Q", y="loss:Q", order="order:Q")


_HEAT = (
  ("loss", "loss", "Loss, nats/token,", charts.LOSS, ".4f"),
  ("dropped_tail", "drops", "Drops", "dropped fraction of assignments", ".1%"),
  (summary.STEP_TIME, "time", "Step time, ms,", "step time, ms", ".3~g"),
)


def heat_maps(
  found: Sequence[Setting], axes: Sequence[str], names: Mapping[str, str]
) -> list[Figure]:
  """Draws loss, drops and step time over two axes: E and capacity if they vary."""
  if len(axes) < 2:
    return []
  down = EXPERTS if EXPERTS in axes else axes[0]
  across = CAPACITY if CAPACITY in axes else next(a for a in axes if a != down)
  if down == across:
    down = next(a for a in axes if a != across)
  groups: dict[Any, list[Setting]] = {}
  for setting in found:
    if down in setting.values and across in setting.values:
      key = analyses.key_without(setting, axes, down, across)
      groups.setdefault(key, []).append(setting)
  out = []
  for i, (key, group) in enumerate(list(groups.items())[:_MOST_COMBINATIONS]):
    suffix = f"_{i + 1}" if len(groups) > 1 else ""
    with_others = f", {summary.label(dict(key), names)}" if key else ""
    for column, stem, title, legend, digits in _HEAT:
      if column == summary.STEP_TIME and not summary.is_steady(found):
        continue
      chart = _heat_map(group, (down, across), names, column, legend, digits)
      if chart is None:
        continue
      out.append(
        Figure(
          name=f"heat_{stem}{suffix}",
          title=f"{title} over {names[down]} and {names[across]}{with_others}",
          caption="Means over seeds. An empty cell has no finished run."
          + (f" Drops over the last {TAIL:.0%} of training." if stem == "drops" else ""),
          chart=chart,
          small=True,
        )
      )
  return out


def _heat_map(
  group: Sequence[Setting],
  pair: tuple[str, str],
  names: Mapping[str, str],
  column: str,
  legend: str,
  digits: str,
) -> Any:
  down, across = pair
  rows = [
    {
      "y": charts.word(down, s.values[down]),
      "x": charts.word(across, s.values[across]),
      "value": s.of(column),
      "setting": s.label,
    }
    for s in group
    if s.of(column) is not None
  ]
  values = [row["value"] for row in rows]
  shape = len({row["y"] for row in rows}), len({row["x"] for row in rows})
  if min(shape) < 2 or len(rows) * 2 < math.prod(shape):
    return None
  log = min(values) > 0 and max(values) > charts.LOG * min(values)
  scale = alt.Scale(scheme="viridis", type="log" if log else "linear")
  middle = (
    math.sqrt(min(values) * max(values)) if log else (min(values) + max(values)) / 2
  )
  base = alt.Chart(charts.data(rows)).encode(
    x=alt.X(
      "x:O",
      sort=charts.levels(group, across),
      title=names[across],
      axis=alt.Axis(labelAngle=0),
    ),
    y=alt.Y("y:O", sort=charts.levels(group, down), title=names[down]),
  )
  cells = base.mark_rect().encode(
    color=alt.Color("value:Q", scale=scale, title=legend, legend=None),
    tooltip=["setting:N", alt.Tooltip("value:Q", title=legend)],
  )
  # Viridis is dark at its low end, whatever the page's colours.
  text = base.mark_text(fontSize=11).encode(
    text=alt.Text("value:Q", format=digits),
    color=alt.condition(f"datum.value < {middle}", alt.value("#fff"), alt.value("#111")),
  )
  height = min(charts.HEIGHT, 44 * max(3, shape[0]))
  return alt.layer(cells, text).properties(height=height)


def drops(
  found: Sequence[Setting], axes: Sequence[str], names: Mapping[str, str]
) -> list[Figure]:
  """Draws the drop rate against the capacity factor."""
  if CAPACITY not in axes or len(charts.levels(found, CAPACITY)) < 2:
    return []
  others = [axis for axis in axes if axis != CAPACITY]
  rows = []
  for setting in found:
    mean = setting.of("dropped_tail")
    if CAPACITY not in setting.values or mean is None:
      continue
    values = [run.values["dropped_tail"] for run in setting.runs]
    spread = float(np.std(values, ddof=1)) / math.sqrt(setting.n) if setting.n > 1 else 0
    rows.append(
      {
        "x": charts.word(CAPACITY, setting.values[CAPACITY]),
        "drop": mean,
        "low": max(mean - spread, 0.0),
        "high": mean + spread,
        "setting": setting.label,
        "group": summary.label(
          {a: setting.values[a] for a in others if a in setting.values}, names
        ),
        "colour": charts.word(others[0], setting.values.get(others[0]))
        if others
        else "all",
      }
    )
  if not any(row["drop"] for row in rows):
    return []
  base = alt.Chart(charts.data(rows)).encode(
    x=alt.X(
      "x:O",
      sort=charts.levels(found, CAPACITY),
      title="capacity factor",
      axis=alt.Axis(labelAngle=0),
    )
  )
  y = alt.Y("drop:Q", title="dropped fraction", axis=alt.Axis(format="~%"))
  line = base.mark_line(point=True).encode(
    y=y, detail="group:N", tooltip=["setting:N", alt.Tooltip("drop:Q", format=".2%")]
  )
  bars = base.mark_rule(opacity=0.8).encode(
    y=alt.Y("low:Q", title="dropped fraction"), y2="high:Q"
  )
  if others:
    colour = charts.colour(others[0], charts.levels(found, others[0]), names)
    line, bars = line.encode(color=colour), bars.encode(color=colour)
  return [
    Figure(
      name="drops_vs_capacity",
      title="Drops against capacity factor",
      caption=f"Assignments not computed, mean over the last {TAIL:.0%} of each run's "
      "logged steps: the same fraction of every schedule, since drops fall as routers "
      "learn to balance. Bars: one standard error over seeds.",
      chart=alt.layer(bars, line).properties(height=charts.HEIGHT),
    )
  ]
