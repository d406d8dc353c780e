"""How a train step grows with the machine, by compiling it: no device is needed.

  python -m tools.scale [--devices=8,16,32,64,128,256] [--json]

For each number of fake CPU devices a process of its own compiles the train step of a
small decoder, experts and batch growing with the devices: one expert and one sequence a
device. What each device computes and sends should then stay the same, and the time to
compile (of the processor, since the machine may be busy) grow more slowly than the
machine. Exit code 1 if one of them does not.

Letters: P devices, G = P groups (a sequence each), E = P experts, C slots per expert and
group, D width, F hidden width of an expert.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moejax.cli import flags as cli

_MOST_DEVICES = 4096

TOKENS = 256
"""Of a sequence: as many as the largest number of experts, so that C is never rounded."""
WIDTH, LAYERS = 32, 2
HIDDEN = 8192
"""Large, so that the router, whose work per token grows with E, is small beside it: its
share is E / 2F, 1.6% of the experts' at 256."""

MAX_FLOPS_CHANGE, MAX_BYTES_CHANGE = 0.03, 0.02


def config_of(devices: int) -> Any:
  """The config for so many devices."""
  from moejax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig

  config = Config(
    data=DataConfig(tokenizer="bytes", sequence_length=TOKENS),
    model=ModelConfig(
      num_layers=LAYERS, width=WIDTH, num_heads=2, hidden=64, scan_layers=False
    ),
    moe=MoEConfig(
      num_experts=devices,
      num_selected=1,
      hidden=HIDDEN,
      capacity_factor=1.0,
      group_size=0,
      every=2,
      exchange="all_to_all",
    ),
    mesh=MeshConfig(data=1, expert=devices),
  )
  config.train.batch_size = devices
  return config


def bytes_by_formula(devices: int) -> int:
  """G*E*C*D numbers of 4 bytes, over all devices."""
  groups, experts = devices, devices
  slots = -(-TOKENS // experts)
  return groups * experts * slots * WIDTH * 4 // devices


def measure(devices: int) -> dict[str, Any]:
  """Compiles the step for so many devices, and counts. In a process of its own."""
  # Before the clock starts.
  from moejax.cli.collectives import compile_step
  from moejax.hlo import parse as hlo
  from moejax.hlo import traffic
  from moejax.train import step  # noqa: F401

  config = config_of(devices)
  begin = time.process_time()
  text, sizes = compile_step(config, devices)
  seconds = time.process_time() - begin

  rows = traffic.rows_of(config, text, sizes, platform="cpu")
  exchanges = [row for row in rows if row["kind"] == "all-to-all"]
  count = sum(row["count"] for row in exchanges)
  total = sum(row["count"] * row["bytes"] for row in exchanges)
  return {
    "devices": devices,
    "flops_per_device": hlo.Program(text).flops(),
    "all_to_alls": count,
    "all_to_all_bytes_per_device": total // max(1, count),
    "formula_bytes_per_device": bytes_by_formula(devices),
    "unintended": [row for row in rows if not row["purpose"]],
    "compile_seconds": round(seconds, 1),
  }


def in_a_process(devices: int) -> dict[str, Any]:
  """`measure` in a new process: the number of devices is fixed once jax has begun."""
  command = [sys.executable, "-m", "tools.scale", f"--compile={devices}"]
  # Nobody runs this code: XLA need not make it fast.
  env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
  return json.loads(done.stdout.splitlines()[-1])


def complaints(rows: list[dict[str, Any]]) -> list[str]:
  """What does not scale as it should, against the smallest machine."""
  first, result = rows[0], []
  for row in rows:
    name = f"{row['devices']} devices"
    formula = row["formula_bytes_per_device"]
    off = abs(row["all_to_all_bytes_per_device"] - formula) / formula
    if off > MAX_BYTES_CHANGE:
      result.append(f"{name}: all-to-all bytes are {100 * off:.1f}% off the formula")
    if row["unintended"]:
      kinds = ", ".join(sorted({r["kind"] for r in row["unintended"]}))
      result.append(f"{name}: unintended {kinds}")
    if row["flops_per_device"] and first["flops_per_device"]:
      change = abs(row["flops_per_device"] / first["flops_per_device"] - 1)
      if change > MAX_FLOPS_CHANGE:
        result.append(f"{name}: FLOPs per device changed by {100 * change:.1f}%")
    slower = row["compile_seconds"] / first["compile_seconds"]
    if row is not first and slower >= row["devices"] / first["devices"]:
      result.append(f"{name}: {slower:.1f} times the time to compile")
  return result


def make_table(rows: list[dict[str, Any]]) -> Table:
  table = Table(box=box.SIMPLE_HEAD)
  for name in (
    "devices",
    "FLOPs/device",
    "of the first",
    "all-to-alls",
    "bytes of one",
    "formula",
    "compile s",
  ):
    table.add_column(name, justify="right")
  for row in rows:
    flops, first = row["flops_per_device"], rows[0]["flops_per_device"]
    table.add_row(
      str(row["devices"]),
      f"{flops:,.0f}" if flops else "-",
      f"{100 * flops / first:.1f}%" if flops and first else "-",
      str(row["all_to_alls"]),
      f"{row['all_to_all_bytes_per_device']:,}",
      f"{row['formula_bytes_per_device']:,}",
      f"{row['compile_seconds']:.1f}",
    )
  return table


def parse(argv: list[str]) -> argparse.Namespace:
  parser = cli.Parser(__doc__)
  parser.add_argument(
    "--devices", default="8,16,32,64,128,256", help="numbers of devices"
  )
  parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
  parser.add_argument("--compile", type=int, default=0, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  try:
    args.devices = [int(number) for number in args.devices.split(",")]
  except ValueError:
    parser.error(
      f"--devices={args.devices}: give numbers separated by commas, such as 8,16"
    )
  if not 2 <= min(args.devices) <= max(args.devices) <= _MOST_DEVICES:
    parser.error(f"--devices={args.devices}: at least 2, at most {_MOST_DEVICES:,}")
  return args


def main(argv: list[str] | None = None) -> int:
  args = parse(sys.argv[1:] if argv is None else argv)
  if args.compile:
    print(json.dumps(measure(args.compile)))
    return 0
  rows = [in_a_process(number) for number in args.devices]
  wrong = complaints(rows)
  if args.json:
    print(json.dumps({"rows": rows, "complaints": wrong}, indent=1))
  else:
    Console(width=100).print(make_table(rows))
    print("\n".join(wrong), end="\n" if wrong else "")
  return int(bool(wrong))


if __name__ == "__main__":
  sys.exit(main())
