"""Figures of speed to quality: held-out loss over steps, and steps saved."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from moejax.sweep.laws import curves as laws
from moejax.sweep.laws.curves import Curve
from moejax.sweep.report import charts, quality
from moejax.sweep.report.charts import Figure
from moejax.sweep.report.summary import Setting

_MOST = 8
"""Most curves in a figure: the dense twin and the best sparse settings."""


def draw(found: Sequence[Setting]) -> list[Figure]:
  """Draws both figures; empty if the sweep lacks a dense twin or sparse settings."""
  twin = quality.best_twin(found)
  sparse = [] if twin is None else quality.comparable(found, twin)
  if twin is None or not sparse:
    return []
  sparse = sorted(sparse, key=lambda setting: setting.mean)[: _MOST - 1]
  means = {s.label: mean_curve(quality.curves(s)) for s in (twin, *sparse)}
  saved = [
    {"setting": setting.label, "step": step, "ratio": ratio}
    for setting in sparse
    for step, ratio in saved_steps(*map(mean_curve, quality.pair(twin, setting)))
  ]
  losses = [
    {"setting": label, "step": float(step), "loss": float(loss)}
    for label, curve in means.items()
    for step, loss in zip(curve.cost, curve.loss, strict=True)
  ]
  most = "" if len(sparse) < _MOST - 1 else f" The {_MOST - 1} best sparse settings."
  colour = _colour(list(means))
  line = alt.Chart(charts.data(losses)).mark_line(strokeWidth=1.5)
  loss = line.encode(
    x=alt.X("step:Q", scale=alt.Scale(nice=False)),
    y=alt.Y("loss:Q", title=charts.LOSS, scale=charts.scale([r["loss"] for r in losses])),
    color=colour,
  )
  figures = [
    Figure(
      name="held_out_curves",
      title="Held-out loss while training",
      caption="Mean over the seeds of each setting; the dense twin, which has the same "
      f"active FLOPs, has the thicker line.{most}",
      chart=_thick(loss, losses, twin.label, colour),
    )
  ]
  if saved:
    figures.append(_saved(saved, colour, most))
  return figures


def mean_curve(seeds: Sequence[Curve]) -> Curve:
  """Returns the mean over seeds, smoothed so that it never rises.

  Args:
    seeds: at least one, all with the same steps.
  """
  loss = np.mean([curve.loss for curve in seeds], axis=0)
  return Curve(cost=seeds[0].cost, loss=laws.smooth(loss))


def saved_steps(twin: Curve, sparse: Curve) -> list[tuple[float, float]]:
  """Returns (step of the twin, that step over the sparse setting's step to equal loss).

  Points whose loss the sparse setting never reaches, or had before its first evaluation,
  are left out.
  """
  out = []
  for step, loss in zip(twin.cost, twin.loss, strict=True):
    needed = laws.cost_to(sparse, float(loss))
    if np.isfinite(needed) and needed > sparse.cost[0]:
      out.append((float(step), float(laws.cost_to(twin, float(loss)) / needed)))
  return out


def _colour(labels: list[str]) -> alt.Color:
  return alt.Color(
    "setting:N",
    sort=labels,
    title=None,
    legend=alt.Legend(columns=1, labelLimit=320),
    scale=alt.Scale(domain=labels, scheme="tableau10"),
  )


def _thick(lines: alt.Chart, rows: charts.Rows, label: str, colour: alt.Color) -> Any:
  own = [row for row in rows if row["setting"] == label]
  thick = alt.Chart(charts.data(own)).mark_line(strokeWidth=3.5)
  thick = thick.encode(x="step:Q", y=alt.Y("loss:Q", title=charts.LOSS), color=colour)
  return alt.layer(lines, thick).properties(height=charts.HEIGHT)


def _saved(rows: charts.Rows, colour: alt.Color, most: str) -> Figure:
  base = alt.Chart(charts.data(rows)).mark_line(strokeWidth=1.5)
  lines = base.encode(
    x=alt.X("step:Q", title="step of the dense twin", scale=alt.Scale(nice=False)),
    y=alt.Y("ratio:Q", title="its steps / steps to its loss"),
    color=colour,
  )
  even = alt.Chart(charts.data([{"ratio": 1}])).mark_rule(strokeDash=[4, 3])
  return Figure(
    name="steps_saved",
    title="Steps saved over training",
    caption="How many times fewer steps a sparse setting needs to reach the loss that "
    "the dense twin has at a step, over the seeds that both have; above the "
    "dashed line it learns in fewer steps. A line ends where the setting does "
    "not reach the twin's loss. Both sides decay their learning rates over the "
    f"whole run.{most}",
    chart=alt.layer(lines, even.encode(y="ratio:Q")).properties(height=charts.HEIGHT),
  )
