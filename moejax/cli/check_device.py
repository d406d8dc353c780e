"""Check this machine's GPUs or TPUs against its CPU, and measure their speed.

  python -m tools.check_device [--output=FILE] [--minutes=10] [--only=kernels,speed]

Every kernel, dispatcher, attention, router and exchange, and fifty steps of training, in
float32 and bfloat16, values and gradients, against the CPU of the same machine
(tolerances: moejax/device_check/compare.py). Then MoE layers of published shapes as
a share of the measured rate of a matrix product, compared with torch's grouped product
where torch is installed. A check that raises, hangs or kills its process is reported in
its row of the table, and the others go on. Exit code 1 if any failed. docs/speed.md says
what the rows mean.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moejax import files
from moejax.cli import arguments
from moejax.cli import flags as cli
from moejax.device_check.runner import FAILED, INTERRUPTED, NOT_RUN, OK, Row, run_all

GROUPS = (
  "kernels",
  "dispatchers",
  "attention",
  "routers",
  "exchanges",
  "training",
  "speed",
)
LONGEST = 120.0
"""Most seconds that one check may take: compiling a large layer takes a minute."""
_COLOURS = {OK: "green", FAILED: "bold red", NOT_RUN: "dim"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = cli.Parser(__doc__)
  parser.add_argument("--output", default="", help="write the rows to this JSON file")
  parser.add_argument(
    "--minutes",
    type=float,
    default=10.0,
    help="minutes for all checks; the rest are not run",
  )
  parser.add_argument(
    "--only", default=",".join(GROUPS), help=f"of {','.join(GROUPS)}; default: all"
  )
  parser.add_argument(
    "--small", action="store_true", help="fewer checks and tiny layers, for a quick try"
  )
  args = parser.parse_args(argv)
  if not args.minutes > 0:
    parser.error(f"--minutes={args.minutes:g} must be above 0.")
  folder = pathlib.Path(args.output).absolute().parent
  if args.output and not folder.is_dir():
    parser.error(f"--output={args.output}: make the directory {folder} first.")
  if args.output and pathlib.Path(args.output).is_dir():
    parser.error(f"--output={args.output} is a directory: name a file in it.")
  arguments.split_names(parser, args, only=GROUPS)
  return args


def set_environment() -> None:
  """Sets the variables that jax reads in a worker: also use the CPU, and share memory."""
  platforms = os.environ.get("JAX_PLATFORMS", "")
  if platforms and "cpu" not in platforms.split(","):
    os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"
  # torch needs some of the memory that jax would take when it starts.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def table_of(rows: Sequence[Row]) -> Table:
  table = Table(box=box.SIMPLE_HEAD, title_justify="left")
  table.add_column("")
  table.add_column("check")
  table.add_column("result", no_wrap=True)
  table.add_column("s", justify="right")
  table.add_column("", overflow="fold")
  group = ""
  for row in rows:
    if row.group != group and group:
      table.add_section()
    colour = _COLOURS[row.status]
    table.add_row(
      row.group if row.group != group else "",
      escape(row.name),
      f"[{colour}]{row.status}[/]",
      f"{row.seconds:.1f}" if row.seconds >= 0.05 else "",
      escape(row.detail),
    )
    group = row.group
  return table


def write(path: str, rows: Sequence[Row], args: argparse.Namespace, begun: float) -> None:
  """Writes the rows as JSON, atomically."""
  content = {
    "begun": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(begun)),
    "seconds": round(time.time() - begun, 1),
    "minutes": args.minutes,
    "small": args.small,
    "rows": [dataclasses.asdict(row) for row in rows],
  }
  files.write_text(path, json.dumps(content, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
  args = parse(argv)
  set_environment()
  # Imported only now, since jax reads the environment on import.
  from moejax.device_check.catalogue import make_checks
  from moejax.device_check.checks import Options

  notes = Console(stderr=True, highlight=False)
  begun = time.time()

  def show(row: Row) -> None:
    colour = _COLOURS[row.status]
    text = f"[{colour}]{row.status:7}[/] {row.group}: {escape(row.name)}"
    notes.print(text, soft_wrap=True)

  rows = run_all(
    make_checks,
    Options(small=args.small, only=tuple(args.only)),
    seconds=60 * args.minutes,
    longest=LONGEST,
    show=show,
  )
  console = Console()
  if not console.is_terminal:
    console = Console(width=140)
  console.print(table_of(rows))
  if args.output:
    write(args.output, rows, args, begun)
  counts = collections.Counter(row.status for row in rows)
  summary = ", ".join(f"{counts[status]} {status}" for status in (OK, FAILED, NOT_RUN))
  console.print(f"{summary}, {time.time() - begun:.0f} s")
  if any(row.detail == INTERRUPTED for row in rows):
    return 130
  return 1 if counts[FAILED] else 0


def run() -> None:
  """Runs the program."""
  sys.exit(main())


if __name__ == "__main__":
  run()
