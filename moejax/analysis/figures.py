"""Figures of an analysis, drawn from analysis.json: PNG for screens, PDF for print.

Letters: L MoE layers, E experts.
"""

import io
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from moejax import files

MAX_PANELS = 4
"""Maximum matrices drawn of a kind: of layers at equal distances."""

MAX_DOMAINS = 12

_CHANCE = {"color": "0.35", "linestyle": "--", "linewidth": 1.2}


def draw(found: dict[str, Any]) -> dict[str, Any]:
  """Returns the figures for which an analysis has measures, by name."""
  # Hides matplotlib's message about its font cache.
  logging.getLogger("matplotlib").setLevel(logging.WARNING)
  figures = {}
  for name, make in FIGURES.items():
    figure = make(found)
    if figure is not None:
      figures[name] = figure
  return figures


def save(figures: dict[str, Any], directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """Writes each figure as PNG and PDF, each file atomically."""
  directory.mkdir(exist_ok=True)
  for name, figure in figures.items():
    for kind in ("png", "pdf"):
      path = directory / f"{name}.{kind}"
      with files.replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=110)
      yield path


def png(figure: Any) -> bytes:
  """Returns a figure as the bytes of a PNG."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=80)
  return buffer.getvalue()


def _panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
  # Not pyplot, which keeps figures alive and sets a backend for the whole process.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width * count, height), layout="constrained")
  return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _some(rows: list[Any]) -> list[Any]:
  """Returns at most `MAX_PANELS` rows, including the first and the last."""
  if len(rows) <= MAX_PANELS:
    return rows
  index = np.linspace(0, len(rows) - 1, MAX_PANELS).round().astype(int)
  return [rows[i] for i in index]


def _matrices(
  rows: list[tuple[str, Any]], *, label: str, axes: tuple[str, str], **scale: Any
) -> Any:
  """Draws square matrices side by side, with one colour scale."""
  figure, panels = _panels(len(rows), 3.4, 3.4)
  image = None
  for panel, (title, matrix) in zip(panels, rows, strict=True):
    image = panel.imshow(np.asarray(matrix), interpolation="nearest", **scale)
    panel.set(title=title, xlabel=axes[0], ylabel=axes[1])
    _whole(panel.xaxis, panel.yaxis)
  figure.colorbar(image, ax=panels, label=label, shrink=0.8)
  return figure


def _whole(*axes: Any) -> None:
  """Sets ticks at whole numbers only: there is no half expert or half step."""
  for axis in axes:
    axis.get_major_locator().set_params(integer=True)


def load(found: dict[str, Any]) -> Any:
  """Draws load over even load, layer by layer."""
  layers = found["layers"]
  share = np.array([layer["load"]["share"] for layer in layers])
  figure, (panel,) = _panels(1, 2 + 0.16 * share.shape[1] + 2.5, 1.6 + 0.3 * len(layers))
  image = panel.imshow(
    share * share.shape[1], aspect="auto", cmap="RdBu_r", vmin=0, vmax=2
  )
  panel.set(title="Load of each expert", xlabel="expert", ylabel="layer")
  panel.set_yticks(range(len(layers)), [str(layer["layer"]) for layer in layers])
  _whole(panel.xaxis)
  figure.colorbar(image, ax=panel, label="load / even load")
  return figure


def coactivation(found: dict[str, Any]) -> Any:
  """Draws the tokens that two experts share, over their number by chance."""
  rows = [
    (f"layer {layer['layer']}", np.array(layer["coactivation"]["over_chance"]))
    for layer in found["layers"]
    if "coactivation" in layer
  ]
  if not rows:
    return None
  for _, matrix in rows:
    np.fill_diagonal(matrix, np.nan)
  return _matrices(
    _some(rows),
    label="together / by chance",
    axes=("expert", "expert"),
    cmap="RdBu_r",
    vmin=0,
    vmax=2,
  )


def flow(found: dict[str, Any]) -> Any:
  """Draws where the tokens of an expert go in the next MoE layer."""
  rows = [
    (f"layer {row['from']} to {row['to']}", row["conditional"])
    for row in found.get("flow", [])
  ]
  if not rows:
    return None
  axes = ("expert in the next MoE layer", "expert")
  label = "share of the expert's tokens"
  return _matrices(_some(rows), label=label, axes=axes, cmap="viridis", vmin=0)


def similarity(found: dict[str, Any]) -> Any:
  """Draws the CKA of the experts' outputs."""
  rows = [
    (f"layer {layer['layer']}", layer["experts"]["cka"])
    for layer in found["layers"]
    if "experts" in layer
  ]
  if not rows:
    return None
  scale = {"cmap": "viridis", "vmin": 0, "vmax": 1}
  return _matrices(
    _some(rows), label="CKA of outputs", axes=("expert", "expert"), **scale
  )


def _over_layers(
  panel: Any, layers: list[Any], values: list[float], **style: Any
) -> None:
  """Draws a value of each layer as a line; an encoder-decoder has one for each stack."""
  points = zip([layer["layer"] for layer in layers], values, strict=True)
  for _, own in itertools.groupby(points, lambda p: str(p[0]).rpartition(".")[0]):
    (line,) = panel.plot(*zip(*own, strict=True), **style)
    style |= {"color": line.get_color(), "label": "_"}  # Named once.


def specialisation(found: dict[str, Any]) -> Any:
  """Draws preferences for words and domains, each with its value by chance."""
  layers = [layer for layer in found["layers"] if "words" in layer]
  if not layers:
    return None
  has_domains = any("domains" in layer for layer in layers)
  figure, panels = _panels(1 + has_domains, 5, 3.4)
  index = [layer["layer"] for layer in layers]
  for name, marker in (("input", "o"), ("target", "s"), ("predicted", "^")):
    # An encoder has no targets or predicted ids, only the ids it reads.
    known = [layer for layer in layers if name in layer["words"]]
    values = [layer["words"][name]["favourite"] for layer in known]
    _over_layers(panels[0], known, values, marker=marker, label=f"{name} id")
  chance = [layer["words"]["input"]["chance"] for layer in layers]
  _over_layers(panels[0], layers, chance, label="shuffled", **_CHANCE)
  panels[0].set(
    title="A word's favourite expert", xlabel="layer", ylabel="share of its tokens"
  )
  if has_domains:
    here = [layer for layer in layers if "domains" in layer]
    for name, style in (("information_fraction", {"marker": "o"}), ("chance", _CHANCE)):
      label = "shuffled" if name == "chance" else "domain"
      values = [layer["domains"][name] for layer in here]
      _over_layers(panels[1], here, values, label=label, **style)
    panels[1].set(
      title="Information of the expert about the domain",
      xlabel="layer",
      ylabel="information / entropy of domains",
    )
  return _finished(figure, panels, index)


def _chance_of(line: Any, x: Any, chance: Any) -> None:
  """Draws the value by chance of one layer, dashed, in the colour of its line."""
  style = _CHANCE | {"color": line.get_color()}
  line.axes.plot(x, chance, **style)


def _name_chances(panel: Any) -> None:
  """Explains the dashed lines in the legend, if there are any."""
  if any(line.get_linestyle() == "--" for line in panel.lines):
    panel.plot([], [], label="chance, each layer's own", **_CHANCE)


def saturation(found: dict[str, Any]) -> Any:
  """Draws the agreement of earlier checkpoints with the last."""
  rows = found.get("saturation", [])
  if not rows:
    return None
  figure, (panel,) = _panels(1, 5.5, 3.6)
  steps = [row["step"] for row in rows]
  for number, layer in enumerate(rows[0]["layers"]):
    own = [row["layers"][number] for row in rows]
    values = [row["saturation"] for row in own]
    (line,) = panel.plot(steps, values, "o-", label=f"layer {layer['layer']}")
    _chance_of(line, steps, [row["chance"] for row in own])
  _name_chances(panel)
  panel.set(
    title="Saturation",
    xlabel="step",
    ylabel="share of choices also made at the last step",
  )
  panel.set_ylim(0, 1.02)
  _whole(panel.xaxis)
  return _finished(figure, [panel])


def consistency(found: dict[str, Any]) -> Any:
  """Draws the share that few experts cover, and the hit rate of a cache of few."""
  layers = [layer for layer in found["layers"] if "consistency" in layer]
  if not layers:
    return None
  figure, panels = _panels(2, 4.8, 3.6)
  for layer in _some(layers):
    name, own = f"layer {layer['layer']}", layer["consistency"]
    if own["segments"]:
      segment = own["segments"][-1]
      size = np.arange(1, len(segment["covered"]) + 1)
      (line,) = panels[0].plot(size, segment["covered"], label=name)
      panels[0].set_title(f"Best experts of {segment['tokens']} tokens")
      _chance_of(line, size, segment["chance"])
    rate = own["lru_hit_rate"]
    panels[1].plot(np.arange(1, len(rate) + 1), rate, label=name)
  _name_chances(panels[0])
  panels[0].set(xlabel="experts kept", ylabel="share of choices covered")
  panels[1].set(title="Cache of the latest experts", xlabel="experts kept")
  panels[1].set_ylabel("hit rate")
  _whole(*(panel.xaxis for panel in panels))
  return _finished(figure, panels)


def drops(found: dict[str, Any]) -> Any:
  """Draws dropped tokens by place, position, frequency and domain."""
  layers = [layer for layer in found["layers"] if "drops" in layer]
  if not layers or not any(sum(layer["drops"]["place"]["lost"]) for layer in layers):
    return None
  kinds = {
    "place": "part of the routing group",
    "position": "position in the document, powers of 2",
    "class": "frequency of the word, from high to low",
    "domain": "domain",
  }
  figure, panels = _panels(len(kinds), 3.6, 3.6)
  for panel, (kind, label) in zip(panels, kinds.items(), strict=True):
    for layer in _some(layers):
      own = layer["drops"][kind]
      tokens = np.array(own["tokens"])
      some = np.flatnonzero(tokens)
      if kind == "domain":
        some = some[np.argsort(-tokens[some], kind="stable")][:MAX_DOMAINS]
      rate, error = np.array(own["lost"])[some], np.array(own["error"])[some]
      index = np.arange(len(some)) if kind == "domain" else some
      name = f"layer {layer['layer']}"
      line = "none" if kind == "domain" else "-"
      style = {"marker": "o", "markersize": 3, "linestyle": line, "label": name}
      panel.errorbar(index, rate, yerr=2 * error, **style)
      if kind == "domain" and found["domains"]:
        names = [found["domains"][i][:14] for i in some]
        panel.set_xticks(index, names, rotation=90, fontsize=7)
    panel.set(xlabel=label, ylim=(0, None))
  panels[0].set_ylabel("tokens that no expert computes")
  return _finished(figure, panels[:1])


def knockout(found: dict[str, Any]) -> Any:
  """Draws the change of the loss without each expert."""
  rows = _some(found.get("knockout", []))
  if not rows:
    return None
  figure, panels = _panels(len(rows), 4, 3.4)
  for panel, row in zip(panels, rows, strict=True):
    index = np.arange(len(row["delta"]))
    panel.bar(index, row["delta"], yerr=2 * np.array(row["error"]), capsize=2)
    panel.axhline(0, color="black", linewidth=0.8)
    _whole(panel.xaxis)
    panel.set(title=f"layer {row['layer']}", xlabel="expert removed")
  panels[0].set_ylabel("change of the loss, nats/token\n± two standard errors")
  return _finished(figure, [])


def replayed(found: dict[str, Any]) -> Any:
  """Draws drops against capacity, with one line for each setting of the other options."""
  rows = [
    entry for entry in found.get("replay", []) if entry["setting"].get("capacity_factor")
  ]
  if len({row["setting"]["capacity_factor"] for row in rows}) < 2:
    return None
  layers = _some(list(range(len(rows[0]["layers"]))))
  figure, panels = _panels(len(layers), 4, 3.6)
  lines: dict[str, list[Any]] = {}
  for row in rows:
    others = {k: v for k, v in row["setting"].items() if k != "capacity_factor"}
    name = ", ".join(str(value) for value in others.values()) or "drops"
    lines.setdefault(name, []).append(row)
  for panel, number in zip(panels, layers, strict=True):
    layer = rows[0]["layers"][number]
    # Policies often drop equally much: a dashed line shows the one below it.
    for line, (name, entries) in zip(
      itertools.cycle(("-", "--", "-.", ":")), lines.items(), strict=False
    ):
      factors = [entry["setting"]["capacity_factor"] for entry in entries]
      rates = [entry["layers"][number]["drop_fraction"] for entry in entries]
      panel.plot(factors, rates, marker="o", linestyle=line, label=name)
    kind = "exact" if layer["exact"] else "approximate"
    panel.set(title=f"layer {layer['layer']}, {kind}", xlabel="capacity factor")
  panels[0].set_ylabel("dropped choices")
  return _finished(figure, panels[:1])


def _finished(figure: Any, panels: list[Any], layers: list[Any] | None = None) -> Any:
  for panel in figure.axes:
    panel.grid(alpha=0.25)
    if layers is not None and len(layers) <= 24:
      panel.set_xticks(layers)
  for panel in panels:
    panel.legend(frameon=False, fontsize=8)
  return figure


FIGURES: dict[str, Callable[[dict[str, Any]], Any]] = {
  "load": load,
  "drops": drops,
  "replay": replayed,
  "specialisation": specialisation,
  "coactivation": coactivation,
  "flow": flow,
  "saturation": saturation,
  "consistency": consistency,
  "similarity": similarity,
  "knockout": knockout,
}
