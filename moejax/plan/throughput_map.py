"""Draws throughput over meshes, with those that do not fit in grey."""

import html
import io
from pathlib import Path
from typing import Any

from moejax import files
from moejax.plan.search import Found, Plan

_INCH = 0.9
"""Inches per cell."""


def cells(found: Found) -> dict[str, dict[tuple[int, int], tuple[bool, Plan]]]:
  """Returns the best plan of each cell by machine, and whether it fits.

  A cell is a size of `expert` times `tensor` and a size of `fsdp`; the rest is `data`.
  """
  result: dict[str, dict[tuple[int, int], tuple[bool, Plan]]] = {}
  ordered = [(True, plan) for plan in found.plans]
  ordered += [(False, plan) for plan in found.too_large]
  for fits, plan in ordered:
    mesh = plan.candidate.mesh
    machine = result.setdefault(str(plan.candidate.topology), {})
    machine.setdefault((mesh["expert"] * mesh["tensor"], mesh["fsdp"]), (fits, plan))
  return result


def draw(found: Found, path: str) -> None:
  """Writes a .png, or a self-contained .html."""
  # Imported late: it takes a second.
  from matplotlib.figure import Figure

  machines = cells(found)
  widest = max(len({fsdp for _, fsdp in own}) for own in machines.values())
  tallest = max(len({split for split, _ in own}) for own in machines.values())
  size = (3 + _INCH * widest, (1.5 + _INCH * tallest) * len(machines))
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.subplots(len(machines), 1, squeeze=False)[:, 0]
  for axis, (name, own) in zip(axes, machines.items(), strict=True):
    _draw_one(axis, name, own)
  buffer = io.BytesIO()
  if path.endswith(".png"):
    figure.savefig(buffer, format="png", dpi=110)
    with files.replacing(path) as temporary:
      Path(temporary).write_bytes(buffer.getvalue())
    return
  figure.savefig(buffer, format="svg")
  text = buffer.getvalue().decode()
  title = html.escape(f"Plans for {', '.join(machines)}")
  page = f"<!doctype html><meta charset=utf-8><title>{title}</title>"
  files.write_text(path, page + text[text.index("<svg") :])


def _draw_one(
  axis: Any, name: str, own: dict[tuple[int, int], tuple[bool, Plan]]
) -> None:
  """Draws one machine: Mtok/s where it fits, GB in grey where it does not."""
  import numpy as np

  rows = sorted({split for split, _ in own})
  columns = sorted({fsdp for _, fsdp in own})
  speed = np.full((len(rows), len(columns)), np.nan)
  for (split, fsdp), (fits, plan) in own.items():
    place = rows.index(split), columns.index(fsdp)
    if fits:
      speed[place] = plan.tokens_per_second / 1e6
      text, color = f"{speed[place]:.3g}", "white"
    else:
      text, color = f"{plan.memory.total / 1e9:.0f} GB", "black"
    axis.text(place[1], place[0], text, ha="center", va="center", color=color, fontsize=8)
  axis.set_facecolor("0.85")
  axis.imshow(speed, cmap="viridis", aspect="auto", origin="lower", vmin=0)
  axis.set_xticks(range(len(columns)), [str(n) for n in columns])
  axis.set_yticks(range(len(rows)), [str(n) for n in rows])
  axis.set_xlabel("fsdp")
  axis.set_ylabel("expert x tensor")
  axis.set_title(f"{name}: Mtok/s; grey: does not fit, with its GB", fontsize=9)
