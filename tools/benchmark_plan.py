"""How near the planner's predictions are to compiled programs.

  python -m tools.benchmark_plan [--compile=NAME,...|all] [--json]

Prints predicted and compiled memory, FLOPs and traffic of the programs in
tools/compiled_programs.py, as recorded, or compiled again (minutes each; the extra `tpu`
or `cuda`). Exit code 1 if half of the predictions of memory are off by more than a tenth,
or one by more than a quarter.
"""

import argparse
import importlib
import json
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moejax.config import Config
from moejax.config import text as config_text
from moejax.cost.chips import CHIPS
from moejax.errors import did_you_mean
from moejax.plan import topology as topology_lib
from tools.compiled_programs import PROGRAMS, Program

_MEDIAN, _WORST = 0.10, 0.25


def config_of(program: Program) -> Config:
  """Returns the config of a program."""
  config = importlib.import_module(f"configs.{program.preset}").get_config()
  settings = {f"mesh.{axis}": size for axis, size in program.mesh.items()}
  for name, value in (settings | dict(program.overrides)).items():
    config_text.set_field(config, name, value)
  return config


def predict(program: Program, weights: Any = None) -> dict[str, float]:
  """Returns predicted memory and traffic in GB, and FLOPs over the model's.

  Args:
    program: of the list.
    weights: of its model, if known; they take a second.
  """
  from moejax.plan import pod
  from moejax.plan.predict import flops, memory, wire
  from moejax.plan.predict.load import load_of
  from moejax.plan.predict.weights import Shares, weights_of

  config, mesh = config_of(program), program.mesh
  family = CHIPS[program.topology.partition(":")[0]].family
  load = load_of(config, mesh, family, has_kernels=family != "gpu")
  shares = Shares(weights or weights_of(config), mesh, config.optimizer.name)
  devices = mesh["data"] * mesh["fsdp"] * mesh["expert"] * mesh["tensor"]
  executed = flops.executed_flops(config, load)["total"]
  return {
    "memory": memory.predicted(config, load, shares).total / 1e9,
    "flops": executed / pod.model_flops(config, devices),
    "wire": sum(row.bytes for row in wire.sent(config, load, shares)) / 1e9,
  }


def compiled_again(program: Program) -> dict[str, float]:
  """Compiles a program; returns what `predict` does, of the compiled program."""
  from moejax.plan import pod
  from moejax.plan.compile import compile_step

  config = config_of(program)
  machine = topology_lib.parse(program.topology, program.slices)
  devices = topology_lib.devices_of(machine)
  chip = topology_lib.chip_of(machine, devices)
  found = pod.report(config, machine, compile_step(config, devices), chip)
  return {
    "memory": found["memory_per_chip_bytes"]["total"] / 1e9,
    "flops": found["executed_flops_per_chip"] / found["model_flops_per_chip"],
    "wire": found["wire_bytes_per_chip"] / 1e9,
  }


def make_table(rows: list[dict[str, Any]]) -> Table:
  table = Table(box=box.SIMPLE_HEAD)
  table.add_column("program", overflow="fold")
  for name in ("memory GB", "FLOPs / model", "sent GB"):
    for header in (name, "compiled", "error"):
      table.add_column(header, justify="right")
  for row in rows:
    cells = [row["name"]]
    for kind in ("memory", "flops", "wire"):
      ours, theirs = row["predicted"][kind], row["compiled"][kind]
      cells += [f"{ours:,.3g}" if ours < 1 else f"{ours:,.2f}", f"{theirs:,.2f}"]
      cells.append(f"{ours / theirs - 1:+.1%}")
    table.add_row(*cells)
  return table


def main() -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument(
    "--compile",
    default="",
    help="programs to compile again, separated by commas, or all",
  )
  parser.add_argument("--json", action="store_true", help="print JSON")
  args = parser.parse_args()
  names = [program.name for program in PROGRAMS]
  again = names if args.compile == "all" else [n for n in args.compile.split(",") if n]
  for name in again:
    if name not in names:
      parser.error(f"--compile={name}: {did_you_mean(name, names)}")
  topology_lib.use_no_device()
  for program in PROGRAMS:
    if program.name in again:
      topology_lib.prepare(topology_lib.parse(program.topology, program.slices))
  rows = []
  for program in PROGRAMS:
    known = {kind: getattr(program, kind) for kind in ("memory", "flops", "wire")}
    compiled = compiled_again(program) if program.name in again else known
    rows.append(
      {"name": program.name, "predicted": predict(program), "compiled": compiled}
    )
  errors = sorted(
    abs(row["predicted"]["memory"] / row["compiled"]["memory"] - 1) for row in rows
  )
  median, worst = errors[len(errors) // 2], errors[-1]
  if args.json:
    print(json.dumps({"median": median, "worst": worst, "programs": rows}, indent=1))
  else:
    console = Console()
    console = console if console.is_terminal else Console(width=130)
    console.print(make_table(rows))
    console.print(f"Memory: median error {median:.1%}, worst {worst:.1%}.")
  return int(median > _MEDIAN or worst > _WORST)


if __name__ == "__main__":
  sys.exit(main())
