"""Draws which device holds which part of every array of an MoE layer, while it runs.

  python -m tools.draw_sharding [--out=docs/sharding] \\
      [--config.mesh.fsdp=2 --config.mesh.expert=2 --config.mesh.tensor=2]

Runs a tiny layer on fake CPU devices and draws what it saw (tools/sharding_record.py):
`layer.png`, each array cut as it is, one colour for each device; `exchange.png`, the
buffers of the all-to-all before and after it. Nothing is drawn from the rules, and
tests/multi_device compares the two.
"""

import colorsys
import io
import pathlib
from typing import Any

from absl import flags

from moejax.cli import flags as cli
from moejax.config import Config, MeshConfig
from tools.sharding_record import Box, Held, Recording, place_of, record

_OUT = flags.DEFINE_string("out", "docs/sharding", "Directory of the pictures.")

_PANELS = (
  ("tokens", "each device its own groups"),
  ("slots, before the exchange", "all experts, the slots of the device's own groups"),
  ("slots, after the exchange", "the device's experts, the groups of its expert peers"),
  ("expert weight, at rest", "cut over expert, fsdp and tensor"),
  ("expert weight, in use", "all-gathered over fsdp: whole in D"),
  ("experts' output", "where the slots were"),
  ("results, back", "where their tokens are"),
  ("output", "each token's results times its gates, summed over tensor"),
)
_LABELS = {"GTD": ("T tokens", "G groups"), "ESD": ("G*C slots", "E experts")}
_INK = "#222222"
_BANDS = 5
"""Of each colour, in what several devices hold."""


def colour(recording: Recording, device: int) -> tuple[float, float, float]:
  """A hue for the tokens it holds, a lightness for its place on the tensor axis."""
  mesh, tensor = recording.mesh, recording.mesh.shape["tensor"]
  shard, index = divmod(int((mesh.device_ids.flat == device).argmax()), tensor)
  hue = (0.58 + shard * tensor / mesh.size) % 1.0
  return colorsys.hls_to_rgb(hue, 0.42 + 0.3 * index / max(1, tensor - 1), 0.62)


def holders(held: Held) -> dict[Box, list[int]]:
  """The devices that hold each part, parts in order."""
  result: dict[Box, list[int]] = {}
  for device, box in sorted(held.parts.items()):
    result.setdefault(box, []).append(device)
  return result


def drawn(held: Held) -> dict[Box, list[int]]:
  """The parts as a picture shows them: of slots, whatever D they have."""
  if held.letters != "ESD":
    return holders(held)
  flat = {d: box[:2] for d, box in held.parts.items()}
  return holders(Held(held.title, "ES", held.shape[:2], flat))


def draw_part(
  axes: Any, recording: Recording, box: Box, devices: list[int], joint: str = ", "
) -> None:
  """A rectangle (rows, columns), in the mixed colours of all devices that hold it."""
  from matplotlib.patches import Polygon, Rectangle

  (top, bottom), (left, right) = box
  width, height = right - left, bottom - top
  frame = Rectangle((left, top), width, height, linewidth=0)
  frame.set_facecolor(colour(recording, devices[0]))
  axes.add_patch(frame)
  if len(devices) > 1:
    # Slanted, so that what several devices have does not look cut.
    bands = _BANDS * len(devices)
    step = 2 * width / bands
    for i in range(bands):
      x = left - width + i * step
      corners = [(x, bottom), (x + step, bottom), (x + step + width, top)]
      band = Polygon([*corners, (x + width, top)], linewidth=0)
      band.set_facecolor(colour(recording, devices[i % len(devices)]))
      axes.add_patch(band)
      band.set_clip_path(frame)
  axes.text(
    left + width / 2,
    top + height / 2,
    joint.join(map(str, devices)),
    ha="center",
    va="center",
    color="white",
    fontsize=11,
    fontweight="bold",
    bbox={"boxstyle": "round,pad=0.25", "facecolor": _INK, "linewidth": 0, "alpha": 0.75},
  )
  edge = Rectangle((left, top), width, height, fill=False, edgecolor="white", linewidth=4)
  axes.add_patch(edge)


def draw_held(axes: Any, recording: Recording, held: Held) -> None:
  """One array: rows and columns, or for expert weights a square for each expert."""
  if held.letters == "EDF":
    experts, rows, columns = held.shape
    gap = columns // 4
    for box, devices in drawn(held).items():
      for e in range(*box[0]):
        shift = e * (columns + gap)
        left, right = box[2]
        draw_part(axes, recording, (box[1], (left + shift, right + shift)), devices)
    for e in range(experts):
      middle = e * (columns + gap) + columns / 2
      axes.text(middle, rows + 0.3, f"expert {e}", ha="center", va="top", fontsize=9)
    width = experts * (columns + gap) - gap
    axes.set(xlim=(-0.1, width + 0.1), ylim=(rows + 1.4, -0.1))
    labels = "F of each expert", "D"
  else:
    for box, devices in drawn(held).items():
      joint = " + " if held.partial else ", "
      draw_part(axes, recording, (box[0], box[1]), devices, joint)
    rows, columns = held.shape[:2]
    axes.set(xlim=(-0.1, columns + 0.1), ylim=(rows + 0.1, -0.1))
    labels = _LABELS[held.letters]
  axes.set_xlabel(labels[0], fontsize=10)
  axes.set_ylabel(labels[1], fontsize=10)
  _bare(axes)


def _bare(axes: Any) -> None:
  axes.set(xticks=[], yticks=[])
  for side in axes.spines.values():
    side.set_visible(False)


def draw_mesh(axes: Any, recording: Recording) -> None:
  """The legend: which device stands where."""
  from matplotlib.patches import Rectangle

  mesh = recording.mesh
  axes.set_title("the mesh", fontsize=12, loc="left", fontweight="bold")
  tensor = mesh.shape["tensor"]
  rows = mesh.device_ids.reshape(-1, tensor)
  for r, row in enumerate(rows):
    for c, device in enumerate(row):
      axes.add_patch(
        Rectangle((c, r), 0.94, 0.9, color=colour(recording, int(device)), linewidth=0)
      )
      text = {"color": "white", "ha": "center", "va": "center", "fontweight": "bold"}
      axes.text(c + 0.47, r + 0.45, f"device {device}", fontsize=10, **text)
    place = []
    rest = r
    for axis in ("expert", "fsdp", "data"):
      rest, index = divmod(rest, mesh.shape[axis])
      if mesh.shape[axis] > 1:
        place.insert(0, f"{axis} {index}")
    axes.text(-0.08, r + 0.45, "\n".join(place), fontsize=9, ha="right", va="center")
  if tensor > 1:
    for c in range(tensor):
      axes.text(c + 0.47, -0.1, f"tensor {c}", fontsize=9, ha="center", va="bottom")
  axes.set(xlim=(-0.8, tensor), ylim=(len(rows), -0.5))
  _bare(axes)


def new_figure(width: float, height: float) -> Any:
  # Not pyplot: it keeps figures alive and chooses a backend for the whole process.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.04)
  figure = Figure(figsize=(width, height), layout=layout)
  FigureCanvasAgg(figure)
  return figure


def save(figure: Any, path: pathlib.Path) -> None:
  """As a PNG of 64 colours, a quarter of the size: the repository keeps it."""
  from PIL import Image

  with io.BytesIO() as png:
    figure.savefig(png, format="png", dpi=100)
    Image.open(png).convert("RGB").quantize(64).save(path, optimize=True)


def mesh_name(recording: Recording) -> str:
  shape = recording.mesh.shape.items()
  return " x ".join(f"{axis} {size}" for axis, size in shape if size > 1)


def draw_layer(recording: Recording, path: pathlib.Path) -> None:
  """All arrays, in the order of the layer's steps."""
  figure = new_figure(15, 11)
  figure.suptitle(
    f"An MoE layer on {mesh_name(recording)}: who holds what. White lines are cuts; "
    "mixed colours mark devices that have the same part (or, with +, an addend of it).",
    fontsize=13,
  )
  grid = figure.subplots(3, 3)
  named = {held.title: held for held in recording.held}
  shown = [(title, text) for title, text in _PANELS if title in named]
  for axes in grid.flat[len(shown) + 1 :]:
    axes.set_visible(False)
  for i, (axes, (title, text)) in enumerate(zip(grid.flat, shown, strict=False)):
    draw_held(axes, recording, named[title])
    axes.set_title(
      f"{i + 1}  {title}", fontsize=12, loc="left", fontweight="bold", pad=20
    )
    axes.text(
      0, 1.02, text, transform=axes.transAxes, fontsize=9.5, color=_INK, va="bottom"
    )
  draw_mesh(grid.flat[len(shown)], recording)
  save(figure, path)


def draw_exchange(recording: Recording, path: pathlib.Path) -> None:
  """The buffers of the exchange: a row of slots for each expert, before and after."""
  devices = [int(d) for d in recording.mesh.device_ids[..., 0].flat]
  figure = new_figure(3.6 * len(devices), 7)
  figure.suptitle(
    f"The exchange on {mesh_name(recording)}, devices of tensor 0: a cell is a slot, "
    "group.token is in it, its colour is that of the token's home.",
    fontsize=13,
  )
  grid = figure.subplots(2, len(devices), squeeze=False)
  for column, device in enumerate(devices):
    for row, buffers in enumerate((recording.sent, recording.received)):
      draw_buffer(grid[row, column], recording, device, buffers[device], after=row == 1)
  save(figure, path)


def draw_buffer(
  axes: Any, recording: Recording, device: int, buffer: Any, *, after: bool
) -> None:
  """One device's slots; the colour is that of the device whose token is in it."""
  from matplotlib.patches import Rectangle

  peers, local, slots, _ = buffer.shape
  tokens = next(h for h in recording.held if h.title == "tokens")
  index = tuple(int(i[0]) for i in (recording.mesh.device_ids == device).nonzero())
  on_axis = recording.mesh.device_ids[index[0], index[1], :, index[3]]
  for peer in range(peers):
    for e in range(local):
      y = peer * (local + 0.35) + e
      expert = (index[2] if after else peer) * local + e
      axes.text(-0.12, y + 0.5, f"expert {expert}", ha="right", va="center", fontsize=9)
      for s in range(slots):
        group, token, _ = place_of(buffer[peer, e, s, :1], recording.sizes)
        home = next(d for d in on_axis if _inside(int(group[0]), tokens.parts[int(d)]))
        axes.add_patch(
          Rectangle((s, y), 0.94, 0.92, color=colour(recording, int(home)), linewidth=0)
        )
        text = {"color": "white", "ha": "center", "va": "center", "fontsize": 9}
        axes.text(s + 0.47, y + 0.46, f"{group[0]}.{token[0]}", **text)
    word = "from" if after else "for"
    axes.text(
      slots + 0.12,
      peer * (local + 0.35) + local / 2,
      f"{word}\ndevice {on_axis[peer]}",
      fontsize=9,
      va="center",
      color=colour(recording, int(on_axis[peer])),
      fontweight="bold",
    )
  axes.set(xlim=(-1.1, slots + 1.2), ylim=(peers * (local + 0.35), -0.1))
  _bare(axes)
  when = "after" if after else "before"
  axes.set_title(
    f"device {device}, {when}",
    fontsize=12,
    fontweight="bold",
    color=colour(recording, device),
  )


def _inside(group: int, box: Box) -> bool:
  return box[0][0] <= group < box[0][1]


def main() -> int:
  config = cli.get_config(Config(mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2)))
  import math

  import jax

  from moejax.config.mesh import AXES

  sizes = [getattr(config.mesh, axis) for axis in AXES]
  number = math.prod(s for s in sizes if s != -1)
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", number)
  recording = record(config.mesh, jax.devices())
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  draw_layer(recording, out / "layer.png")
  if recording.sent:
    draw_exchange(recording, out / "exchange.png")
  print(f"{out}: {', '.join(sorted(p.name for p in out.glob('*.png')))}")
  return 0


if __name__ == "__main__":
  cli.define_config(default=None)
  cli.run(main)
