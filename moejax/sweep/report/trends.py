"""Figures of curves, fits and effects: training loss, isoFLOP, main effects."""

import math
from collections.abc import Mapping, Sequence

import altair as alt
import numpy as np

from moejax.sweep.report import analyses, charts, summary, words
from moejax.sweep.report.charts import Figure
from moejax.sweep.report.summary import Setting

_POINTS = 100
"""Points per loss curve: each is the mean of the steps around it."""
_MOST_CURVES = 8


def curves(
  found: Sequence[Setting], axes: Sequence[str], names: Mapping[str, str]
) -> list[Figure]:
  """Draws training loss with a band over seeds: the best setting per level if many."""
  shown = [s for s in found if all(len(run.curve.step) > 1 for run in s.runs)]
  which = "Every setting."
  if len(shown) > _MOST_CURVES and axes:
    best: dict[str, Setting] = {}
    for setting in sorted(shown, key=lambda s: s.mean):
      best.setdefault(charts.word(axes[0], setting.values.get(axes[0])), setting)
    ordered = sorted(best.values(), key=lambda s: shown.index(s))
    shown = ordered[:_MOST_CURVES]
    which = f"Only the setting with the lowest loss for each {names[axes[0]]}."
  if not shown:
    return []
  rows = [row for setting in shown for row in _curve(setting)]
  if not rows:
    return []
  # The first steps fall from log V and would flatten everything after them.
  steps = max(row["step"] for row in rows)
  after = [row for row in rows if row["step"] >= steps / 10]
  ceiling = max(row["high"] for row in after)
  floor = min(row["low"] for row in rows)
  labels = [setting.label for setting in shown]
  base = alt.Chart(charts.data(rows)).encode(
    x=alt.X("step:Q", title="step", scale=alt.Scale(nice=False)),
    color=alt.Color(
      "setting:N",
      sort=labels,
      title=None,
      legend=alt.Legend(columns=1, labelLimit=320),
      scale=alt.Scale(domain=labels, scheme="tableau10"),
    ),
  )
  y = alt.Y(
    "loss:Q",
    title="training loss, nats/token",
    scale=alt.Scale(domain=[floor, ceiling], nice=False, zero=False),
  )
  band = base.mark_area(opacity=0.2, clip=True).encode(
    y=alt.Y("low:Q", title="training loss, nats/token"), y2="high:Q"
  )
  line = base.mark_line(clip=True, strokeWidth=1.5).encode(y=y)
  return [
    Figure(
      name="loss_curves",
      title="Training loss",
      caption=f"{which} Line: mean over seeds of the loss of the training batch, "
      "averaged over neighbouring steps. Band: lowest to highest seed. The first tenth "
      "may lie above the figure.",
      chart=alt.layer(band, line).properties(height=charts.HEIGHT),
    )
  ]


def _curve(setting: Setting) -> charts.Rows:
  """Returns a setting's curve: mean, lowest and highest seed in bins of steps."""
  last = max(run.curve.step[-1] for run in setting.runs)
  bins: dict[int, dict[int, list[float]]] = {}
  for i, run in enumerate(setting.runs):
    for step, loss in zip(run.curve.step, run.curve.loss, strict=True):
      if math.isfinite(loss):
        at = min(_POINTS * step // last, _POINTS - 1)
        bins.setdefault(at, {}).setdefault(i, []).append(loss)
  rows = []
  for at, by_seed in sorted(bins.items()):
    if len(by_seed) == len(setting.runs):
      means = [float(np.mean(losses)) for losses in by_seed.values()]
      rows.append(
        {
          "step": (at + 0.5) * last / _POINTS,
          "loss": float(np.mean(means)),
          "low": min(means),
          "high": max(means),
          "setting": setting.label,
        }
      )
  return rows


def isoflops(
  found: Sequence[Setting], fields: Sequence[str], names: Mapping[str, str]
) -> list[Figure]:
  """Draws loss against size for each budget, with the quadratic and its minimum."""
  points, fits, minima = [], [], []
  for curve in analyses.isoflops(found, fields):
    series = f"{curve.budget:.2g} FLOPs"
    if curve.others:
      series += f", {summary.label(curve.others, names)}"
    for size, loss in zip(curve.sizes, curve.losses, strict=True):
      points.append({"size": size, "loss": loss, "series": series})
    c0, c1, c2 = curve.coefficients
    low, high = math.log10(curve.sizes[0]), math.log10(curve.sizes[-1])
    for x in np.linspace(low, high, 60).tolist():
      fits.append({"size": 10**x, "loss": c0 + c1 * x + c2 * x * x, "series": series})
    if curve.minimum is not None:
      minima.append(
        {"size": curve.minimum.estimate, "loss": curve.loss, "series": series}
      )
  if not points:
    return []
  order = list(dict.fromkeys(row["series"] for row in points))
  colour = alt.Color(
    "series:N",
    sort=order,
    title=None,
    legend=alt.Legend(columns=1, labelLimit=320),
    scale=alt.Scale(domain=order, scheme="tableau10"),
  )
  encode = {
    "x": alt.X(
      "size:Q",
      title="active parameters",
      scale=alt.Scale(type="log", nice=False, padding=12),
      axis=alt.Axis(format="~s"),
    ),
    "y": alt.Y("loss:Q", title=charts.LOSS, scale=alt.Scale(zero=False, padding=12)),
    "color": colour,
  }
  layers = [
    alt.Chart(charts.data(fits)).mark_line(strokeWidth=1.5, opacity=0.7).encode(**encode),
    alt.Chart(charts.data(points)).mark_point(filled=True, size=50).encode(**encode),
  ]
  if minima:
    star = alt.Chart(charts.data(minima)).mark_point(
      shape="diamond", size=160, strokeWidth=2
    )
    layers.append(star.encode(**encode))
  return [
    Figure(
      name="isoflop",
      title="Loss against size at equal training FLOPs",
      caption="Each colour is a budget. Lines: a quadratic in log10 of the size. "
      "Diamonds: its minimum; a curve without one has its lowest loss at the edge of "
      "the sizes tried, or does not bend upward.",
      chart=alt.layer(*layers).properties(height=charts.HEIGHT),
    )
  ]


def main_effects(
  found: Sequence[Setting], axes: Sequence[str], names: Mapping[str, str]
) -> list[Figure]:
  """Draws the main effect of each axis, one figure per axis."""
  effects = analyses.main_effects(found, axes)
  out = []
  for axis in dict.fromkeys(effect.axis for effect in effects):
    own = [effect for effect in effects if effect.axis == axis]
    rows = [
      {
        "level": charts.word(axis, e.level),
        "effect": e.effect.estimate,
        "low": e.effect.low,
        "high": e.effect.high,
      }
      for e in own
    ]
    base = alt.Chart(charts.data(rows)).encode(
      y=alt.Y("level:O", sort=[row["level"] for row in rows], title=names[axis])
    )
    title = "effect on the loss, nats/token"
    # Every label or every second one: a greedy choice leaves uneven steps.
    axis_of_x = alt.Axis(labelOverlap="parity")
    points = base.mark_point(filled=True, size=70).encode(
      x=alt.X("effect:Q", title=title, axis=axis_of_x),
      tooltip=["level:O", "effect:Q", "low:Q", "high:Q"],
    )
    bars = base.transform_filter("isValid(datum.low)").mark_rule()
    bars = bars.encode(x=alt.X("low:Q", title=title), x2="high:Q")
    zero = alt.Chart(charts.data([{"x": 0}])).mark_rule(strokeDash=[3, 3], color="#888")
    zero = zero.encode(x=alt.X("x:Q", title=title))
    seeds = own[0].effect.n
    out.append(
      Figure(
        name=f"main_effect_{names[axis].replace('.', '_')}",
        title=f"Main effect of {names[axis]}",
        caption=f"Loss at each level minus the mean over levels, averaged with equal "
        f"weight over {words.count(own[0].cells, 'combination')} of the other axes. "
        + (
          f"Bars: {summary.LEVEL:.0%} intervals (Student's t, {seeds} seeds)."
          if seeds > 1
          else "One seed: no intervals."
        ),
        chart=alt.layer(zero, bars, points).properties(
          height=max(90, min(charts.HEIGHT, 34 * len(rows)))
        ),
        small=True,
      )
    )
  return out
