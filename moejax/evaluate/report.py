"""Draws report.png, an overview of a run: loss, expert load, and where time goes.

All data is read from the run's directory (metrics.jsonl, eval.json, step_time.json), so
it can be redrawn at any time, even during the run.

Letters: L MoE layers, E experts, R logged steps.
"""

import collections
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from moejax import files
from moejax.alarms import history
from moejax.run import results, writers
from moejax.storage.paths import RunPath, run_path

FILE = "report.png"

MAX_ROWS = 64
"""Maximum (layer, expert) pairs drawn over time; above, only the last step is drawn."""

_LEGEND = {"framealpha": 0.9, "edgecolor": "none"}
"""Style of a legend that is readable over curves and hatching."""

_HATCHES = ("//", "\\\\", "--", "||", "..", "xx")
"""Hatching that distinguishes overlapping alarms without colour."""

_BAR_INCHES = 1.3
"""Height of the bar that shows where time goes."""

_NAME_INCHES = 0.52
"""Narrower parts of the bar are drawn as one, since their names would not fit."""

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

  # Hides matplotlib's message about its font cache.
  logging.getLogger("matplotlib").setLevel(logging.WARNING)
  has_load = any("load" in line.get("moe", {}) for line in lines)
  spent = results.read(workdir / results.STEP_TIME_FILE)
  width, extra = (13 if has_load else 7), (_BAR_INCHES if spent else 0.0)
  figure = Figure(figsize=(width, 5 + extra), layout="constrained")
  FigureCanvasAgg(figure)
  upper: Any = figure
  if spent:
    halves: Any = figure.subfigures(2, 1, height_ratios=(5, extra))
    upper, lower = halves
    draw_time(lower.subplots(), spent, least=_NAME_INCHES / width)
  axes = upper.subplots(1, 2 if has_load else 1, squeeze=False)[0]
  draw_loss(axes[0], lines, final)
  draw_alarms(axes[0], lines)
  if has_load:
    image = draw_load(axes[1], lines)
    bar = upper.colorbar(image, ax=axes[1], pad=0.02)
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
  axes.legend(**_LEGEND)


def draw_alarms(axes: Any, lines: list[dict[str, Any]]) -> None:
  """Shades the steps of each alarm, if any, and names it in the legend."""
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
    axes.legend(**_LEGEND)


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


def time_shares(spent: Mapping[str, Any], least: float) -> dict[str, float]:
  """Returns each part's share of a step, mean over devices; the sum is 1.

  Args:
    spent: content of step_time.json.
    least: minimum share of a part to be named.

  Returns:
    Parts in descending order, those below `least` together as `other`, and finally
    `waiting`: a device's time waiting for the host or for other devices.
  """
  devices, shares = spent["devices"], collections.defaultdict[str, float](float)
  whole = sum(device["busy"] + device["waiting"] for device in devices)
  for device in devices:
    for part in device["parts"]:
      shares[part["name"]] += (part["forward"] + part["backward"]) / whole
  waiting = sum(device["waiting"] for device in devices) / whole
  drawn = {
    name: share
    for name, share in sorted(shares.items(), key=lambda item: -item[1])
    if share >= least
  }
  return drawn | {"other": 1 - waiting - sum(drawn.values()), "waiting": waiting}


def draw_time(axes: Any, spent: Mapping[str, Any], least: float) -> None:
  """Draws one bar: the parts of a step by their share of its time; see `time_shares`."""
  left = 0.0
  for number, (name, share) in enumerate(time_shares(spent, least).items()):
    grey = name in ("other", "waiting")
    axes.barh(
      0,
      share,
      left=left,
      color="0.9" if grey else f"C{number % 10}",
      alpha=1.0 if grey else 0.45,
      hatch="//" if name == "waiting" else None,
      edgecolor="white",
    )
    if share >= least:
      text = f"{name}\n{100 * share:.0f}%".replace("_", "\n")
      axes.text(left + share / 2, 0, text, ha="center", va="center", fontsize=8)
    left += share
  first, count = spent["first_step"], spent["num_steps"]
  many = len(spent["devices"])
  mean = f", mean of {many} devices" if many > 1 else ""
  title = (
    f"Where a step's {spent['step_ms']:,.0f} ms go (trace of steps {first} to "
    f"{first + count - 1}{mean}; hatched: waiting)"
  )
  axes.set_title(title, fontsize=10)
  axes.set(xlim=(0, 1), ylim=(-0.4, 0.4))
  axes.set_axis_off()


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
