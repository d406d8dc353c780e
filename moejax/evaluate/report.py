"""Draws report.png, an overview of a run: loss curves and expert load.

All data is read from the run's directory (metrics.jsonl, eval.json), so it can be
redrawn at any time, even during the run.

Letters: L MoE layers, E experts, R logged steps.
"""

import logging
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from moejax import files
from moejax.alarms import history
from moejax.run import results, writers
from moejax.storage.paths import RunPath, run_path

FILE = "report.png"

MAX_ROWS = 64
"""Most (layer, expert) pairs drawn over time; with more, only the last step is drawn."""

_HATCHES = ("//", "\\\\", "--", "||", "..", "xx")
"""So that overlapping alarms can be told apart without colour."""

_NAMED_LOADS = (0.25, 0.5, 1.0, 2.0, 4.0)


def draw(workdir: RunPath | str) -> RunPath | None:
  """Draws the report of a run.

  Args:
    workdir: of the run; eval.json may be missing.

  Returns:
    Path of the PNG; None if no step has been logged.
  """
  workdir = run_path(workdir)
  lines = writers.read(workdir / writers.METRICS_FILE)
  if not lines:
    return None
  final = results.read(workdir / results.EVAL_FILE)
  # Not pyplot, which keeps figures alive and sets a backend for the whole process.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  has_load = any("load" in line.get("moe", {}) for line in lines)
  # Hides matplotlib's message about its font cache.
  logging.getLogger("matplotlib").setLevel(logging.WARNING)
  figure = Figure(figsize=(13, 5) if has_load else (7, 5), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(1, 2 if has_load else 1, squeeze=False)[0]
  draw_loss(axes[0], lines, final)
  draw_alarms(axes[0], lines)
  if has_load:
    image = draw_load(axes[1], lines)
    bar = figure.colorbar(image, ax=axes[1], pad=0.02)
    bar.set_label("load / mean load of the layer")
    bar.set_ticks(
      list(_NAMED_LOADS), labels=["1/4 or less", "1/2", "1", "2", "4 or more"]
    )
    bar.ax.minorticks_off()
  path = workdir / FILE
  with files.replacing(path) as temporary:
    figure.savefig(temporary, format="png", dpi=130)
  return path


def draw_loss(axes: Any, lines: list[dict[str, Any]], final: dict[str, Any]) -> None:
  """Draws training loss (raw and smoothed), validation loss and the two baselines."""
  steps, losses = _series(lines, "loss")
  axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
  axes.plot(steps, smooth(losses), color="tab:blue", linewidth=1.8, label="training")
  at, validation = _series(lines, "validation_loss")
  if at.size:
    label = f"validation{_covered(lines)}"
    axes.plot(at, validation, "o-", color="tab:orange", markersize=4, label=label)
  for (name, baseline), style in zip(
    final.get("baselines", {}).items(), ("--", ":", "-."), strict=False
  ):
    value = baseline.get("loss")
    if value is not None:
      label = f"{name} ({baseline['bits_per_byte']:.2f} bits/byte)"
      axes.axhline(value, color="0.35", linestyle=style, linewidth=1.2, label=label)
  axes.set(xlabel="step", ylabel="cross-entropy, nats/token", title=_title(final))
  axes.set_xlim(left=0)
  axes.grid(alpha=0.25)
  axes.legend(frameon=False)


def draw_alarms(axes: Any, lines: list[dict[str, Any]]) -> None:
  """Shades the steps of each alarm and names it in the legend; nothing without any."""
  found = history.spans(lines) or {}
  for number, (name, times) in enumerate(found.items()):
    for index, (first, after) in enumerate(times):
      axes.axvspan(
        first,
        lines[-1]["step"] if after is None else after,
        facecolor="none",
        edgecolor=f"C{3 + number % 6}",
        hatch=_HATCHES[number % len(_HATCHES)],
        alpha=0.35,
        label=f"alarm: {name}" if not index else None,
      )
  if found:
    axes.legend(frameon=False)


def draw_load(axes: Any, lines: list[dict[str, Any]]) -> Any:
  """Draws expert load over its layer's mean; returns the image for a colour bar."""
  from matplotlib import colors

  rows = [line for line in lines if "load" in line.get("moe", {})]
  loads = np.stack([np.asarray(row["moe"]["load"], np.float64) for row in rows])
  num_layers, num_experts = loads.shape[1:]
  relative = loads * num_experts
  # Log scale: half and double the mean are equally far from white.
  scale = {"cmap": "RdBu_r", "norm": colors.LogNorm(_NAMED_LOADS[0], _NAMED_LOADS[-1])}
  if num_layers * num_experts > MAX_ROWS:
    axes.set(xlabel="expert", ylabel="MoE layer", title="Expert load, last logged step")
    return axes.imshow(
      np.maximum(relative[-1], 1e-6), aspect="auto", interpolation="nearest", **scale
    )
  steps = np.asarray([row["step"] for row in rows], np.float64)
  grid = np.maximum(relative.reshape(len(rows), -1).T, 1e-6)
  image = axes.pcolormesh(_edges(steps), np.arange(grid.shape[0] + 1), grid, **scale)
  for layer in range(1, num_layers):
    axes.axhline(layer * num_experts, color="black", linewidth=1.5)
  axes.set_yticks(
    np.arange(grid.shape[0]) + 0.5,
    [f"{e}" for _ in range(num_layers) for e in range(num_experts)],
    fontsize=8 if grid.shape[0] <= 32 else 5,
  )
  axes.invert_yaxis()
  label = "expert" if num_layers == 1 else "expert, by MoE layer (first on top)"
  axes.set(xlabel="step", ylabel=label, title="Expert load while training")
  return image


def smooth(values: Float[np.ndarray, "R"]) -> Float[np.ndarray, "R"]:
  """Returns the bias-corrected exponential moving average."""
  out = np.empty_like(values)
  # Averages over about 1/30 of the curve, so that short curves keep their shape.
  keep = 1.0 - min(1.0, 30.0 / max(len(values), 1))
  mean = weight = 0.0
  for i, value in enumerate(values):
    mean = keep * mean + (1 - keep) * value
    weight = keep * weight + (1 - keep)
    out[i] = mean / weight
  return out


def _edges(steps: Float[np.ndarray, "R"]) -> Float[np.ndarray, "R1"]:
  """Returns cell edges halfway between logged steps."""
  if len(steps) == 1:
    return np.asarray([steps[0] - 0.5, steps[0] + 0.5])
  middle = (steps[1:] + steps[:-1]) / 2
  first, last = 2 * steps[0] - middle[0], 2 * steps[-1] - middle[-1]
  return np.concatenate([[first], middle, [last]])


def _series(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns steps and values of the lines with a finite number under `name`."""
  found = [
    (line["step"], line[name])
    for line in lines
    if isinstance(line.get(name), int | float) and math.isfinite(line[name])
  ]
  table = np.asarray(found, np.float64).reshape(-1, 2)
  return table[:, 0], table[:, 1]


def _covered(lines: list[dict[str, Any]]) -> str:
  """Returns the validation tokens covered; empty if not logged (earlier versions)."""
  for line in reversed(lines):
    if "validation_split_tokens" in line:
      tokens = line["validation_num_tokens"], line["validation_split_tokens"]
      return f" ({results.coverage(*tokens)})"
  return ""


def _title(final: dict[str, Any]) -> str:
  if "loss" not in final:
    return "Loss"
  text = f"Final validation loss {final['loss']:.3f} nats/token"
  if final.get("bits_per_byte"):
    text += f" = {final['bits_per_byte']:.2f} bits/byte"
  if "tokens" in final:
    text += f"\n{results.coverage(final['tokens'], final.get('split_tokens'))}"
  return text
