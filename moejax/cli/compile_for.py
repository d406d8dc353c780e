"""Compile the real train step for a pod without having it: does it fit, how fast is it?

  python -m tools.compile_for --config=configs/mixtral_8x7b.py --topology=v5p:4x4x8 \\
      [--slices=2] [--json] [--hlo=FILE]

Compiles for TPU slices (extra `tpu`: v5p:4x4x8, v5e:16x16, v6e:16x16, ...), for GPU nodes
(extra `cuda`: h100:4x8 is four nodes of eight) or for fake devices (cpu:8), without
loading data or parameters. Prints memory per chip and its HBM, executed and model FLOPs,
every collective, and a roofline. Exit code 1 if it does not fit. docs/scale.md explains
the figures.
"""

import json
import pathlib
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from moejax import files
from moejax.cli import arguments
from moejax.cli import flags as cli
from moejax.cli.collective_table import make_table
from moejax.plan import topology as topology_lib
from moejax.plan.units import quantity

_TOPOLOGY = flags.DEFINE_string("topology", "cpu:8", "KIND:SHAPE, such as v5p:4x4x8.")
_SLICES = flags.DEFINE_integer(
  "slices", 1, "Number of TPU slices of that shape.", lower_bound=1, upper_bound=4096
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of tables.")
_HLO = flags.DEFINE_string("hlo", None, "Write the optimised program to this file.")

_TABLE_WIDTH = 150
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def measure(topology: topology_lib.Topology, hlo: str | None) -> dict[str, Any]:
  """Compiles and returns a report; a short one if the compiler runs out of memory."""
  from moejax.plan import pod
  from moejax.plan.compile import compile_step

  devices = topology_lib.devices_of(topology)
  chip = topology_lib.chip_of(topology, devices)
  config = cli.get_config()
  try:
    step = compile_step(config, devices)
  except Exception as error:
    if _OUT_OF_MEMORY not in str(error):
      raise
    return pod.refused(topology, len(devices), chip, _first_lines(str(error)))
  if hlo:
    files.write_text(hlo, step.compiled.as_text())
  return pod.report(config, topology, step, chip)


def _first_lines(message: str) -> str:
  """Returns the compiler's message without the list of allocations."""
  lines = [line.strip() for line in message.splitlines() if line.strip()]
  return " ".join(lines[:3])[:600]


def memory_table(found: dict[str, Any]) -> Table:
  table = Table(box=box.SIMPLE_HEAD, title="memory per chip")
  table.add_column("kind")
  table.add_column("bytes", justify="right")
  memory = found["memory_per_chip_bytes"]
  for kind in (
    "parameters",
    "optimizer",
    "other_arguments",
    "saved_activations",
    "gradients",
    "buffers",
  ):
    table.add_row(kind.replace("_", " "), quantity(memory[kind], "B"))
  table.add_section()
  table.add_row("total", quantity(memory["total"], "B"), style="bold")
  if found["hbm_bytes"]:
    table.add_row("HBM", quantity(found["hbm_bytes"], "B"))
  if memory["host"]:
    table.add_row("in the host's memory", quantity(memory["host"], "B"))
  return table


def summary(found: dict[str, Any]) -> list[str]:
  """Returns the lines below the tables."""
  executed, model = found["executed_flops_per_chip"], found["model_flops_per_chip"]
  sent, bound = found["wire_bytes_per_chip"], found["wire_bound_bytes_per_chip"]
  lines = [
    f"FLOPs per chip and step: {quantity(executed, largest='T')} executed, "
    f"{quantity(model, largest='T')} of the model: {executed / model:.3f}x",
    f"Sent per chip and step: {quantity(sent, 'B')}, the least is {quantity(bound, 'B')}"
    + (f": {sent / bound:.3f}x" if bound else ""),
  ]
  times = found["roofline"]
  if times:
    parts = [
      f"{name} {quantity(value, 's', largest='')}"
      for name, value in times.items()
      if name not in ("step_seconds", "bound_by") and value
    ]
    lines.append(
      f"Roofline: {', '.join(parts)}. At best "
      f"{quantity(times['step_seconds'], 's', largest='')} a step, bound by "
      f"{times['bound_by']}."
    )
  lines.append(
    f"Compiled in {found['compile_seconds']:.0f} s for {found['chips']} devices."
  )
  return lines


def show(found: dict[str, Any], console: Console) -> None:
  if "refusal" in found:
    console.print(f"Does not fit: {found['refusal']}", markup=False)
    return
  console.print(make_table(found["collectives"]))
  console.print(memory_table(found))
  for line in summary(found):
    console.print(line, markup=False, highlight=False)
  if found["hbm_bytes"]:
    used = quantity(found["memory_per_chip_bytes"]["total"], "B")
    there = quantity(found["hbm_bytes"], "B")
    verdict = "fits" if found["fits"] else "does NOT fit"
    console.print(f"{found['topology']}: {verdict}, {used} of {there}.")


def main() -> int:
  topology = topology_lib.parse(_TOPOLOGY.value, _SLICES.value)
  if _HLO.value:
    arguments.writable_file(pathlib.Path(_HLO.value), "--hlo")
  topology_lib.prepare(topology)  # Before anything imports jax.
  cli.get_config()  # Rejects a bad config before the compiler starts.
  found = measure(topology, _HLO.value)
  if _JSON.value:
    print(json.dumps(found, indent=1))
  else:
    console = Console()
    show(found, console if console.is_terminal else Console(width=_TABLE_WIDTH))
  return int(not found["fits"])


def run() -> None:
  """Runs the program."""
  cli.define_config(workdir=False)
  cli.run(main)


if __name__ == "__main__":
  run()
