"""Common parts of a report's figures: form, scales, colours and output.

The same chart is used for the page (as wide as its place, in the page's colours) and for
the files (PNG and PDF, black on white).

Source of the chart grammar: Satyanarayan et al., "Vega-Lite", IEEE TVCG 23 (2017).
"""

import copy
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import vl_convert

from moejax import files
from moejax.sweep.report import summary
from moejax.sweep.report.analyses import CAPACITY
from moejax.sweep.report.summary import Setting

_VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
"""The Vega-Lite version that Altair writes; vl_convert has several."""

_SCALE = 2
"""Pixels of a PNG per pixel of its chart."""

HEIGHT = 300
SUFFIXES = (".png", ".pdf")
"""Suffixes of the files of each figure."""
FILE_WIDTH = 520
"""Width of the plot in PNG and PDF, in pixels at scale 1."""

LOSS = "held-out loss, nats/token"

LOG = 3.0
"""Values that span more than this ratio are drawn on a log axis."""

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
  """One figure."""

  name: str
  """File name without its suffix."""
  title: str
  caption: str
  """How to read it."""
  chart: Any
  small: bool = False
  """Whether it is shown next to others of its kind."""


def data(rows: Rows) -> Any:
  return alt.InlineData(values=rows)


def word(field: str, value: Any) -> str:
  """Returns a value for an axis or legend."""
  return "dropless" if field == CAPACITY and value is None else summary.short(value)


def levels(found: Iterable[Setting], axis: str) -> list[str]:
  values = [s.values[axis] for s in found if axis in s.values]
  distinct = [v for i, v in enumerate(values) if v not in values[:i]]
  return [word(axis, v) for v in sorted(distinct, key=summary.order)]


def scale(values: Sequence[float]) -> Any:
  positive = [v for v in values if v > 0]
  if positive and max(positive) > LOG * min(positive):
    return alt.Scale(type="log", nice=False, padding=12)
  return alt.Scale(zero=False, nice=False, padding=12)


def colour(axis: str, levels: Sequence[str], names: Mapping[str, str]) -> Any:
  return alt.Color(
    "colour:N",
    sort=list(levels),
    title=names[axis],
    scale=alt.Scale(domain=list(levels), scheme="tableau10"),
  )


_INK = "currentColor"
_CONFIG: dict[str, Any] = {
  "background": "transparent",
  "view": {"stroke": None},
  "font": "system-ui, sans-serif",
  "axis": {"labelOverlap": "greedy", "labelSeparation": 5},
  "legend": {
    "orient": "bottom",
    "direction": "horizontal",
    "columns": 5,
    "symbolOpacity": 1,
    # Legends are stacked, since side by side they do not fit a narrow page.
    "layout": {"bottom": {"anchor": "start", "direction": "vertical"}},
  },
}


def page_spec(figure: Figure) -> dict[str, Any]:
  """Returns a figure's Vega-Lite, as wide as its place and in the text's colour."""
  ink = {"labelColor": _INK, "titleColor": _INK}
  lines = {"gridColor": _INK, "gridOpacity": 0.15, "tickColor": _INK, "domainColor": _INK}
  config: dict[str, Any] = copy.deepcopy(_CONFIG)
  config["axis"] |= ink | lines
  config["legend"] |= ink | {"symbolBaseFillColor": _INK, "symbolBaseStrokeColor": _INK}
  config["rule"] = {"color": _INK}
  spec = figure.chart.to_dict()
  fit = {"type": "fit-x", "contains": "padding"}
  return spec | {"width": "container", "autosize": fit, "config": config}


def save(figure: Figure, directory: pathlib.Path) -> None:
  """Writes NAME.png and NAME.pdf: titled, of fixed width, black on white."""
  config = {**_CONFIG, "background": "white"}
  spec = figure.chart.to_dict() | {"width": FILE_WIDTH, "title": figure.title}
  spec |= {"config": config}
  png = vl_convert.vegalite_to_png(spec, vl_version=_VEGA_LITE, scale=_SCALE)
  pdf = vl_convert.vegalite_to_pdf(spec, vl_version=_VEGA_LITE)
  for suffix, content in zip(SUFFIXES, (png, pdf), strict=True):
    with files.replacing(directory / (figure.name + suffix)) as temporary:
      temporary.write_bytes(content)


def library() -> str:
  """Returns the scripts that draw `page_spec` in a browser, as one text."""
  # The function's type stub lacks the default.
  return vl_convert.javascript_bundle(vl_version=_VEGA_LITE)  # pyright: ignore[reportCallIssue]
