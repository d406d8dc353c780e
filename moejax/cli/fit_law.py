"""Fit a scaling law to the results of a sweep.

  python -m tools.fit_law RESULTS.csv --law=ludziejewski [--fix=e_start=2,e_max=300]
    [--columns=N=N_total,D=tokens] [--loss=loss] [--level=0.9] [--draws=400] [--json]

Reads the columns N_active, N_total, tokens, C, num_experts and loss of a results.csv, one
row per run or per setting, and prints each constant with its bootstrap interval, the
error on held-out runs and what the runs do not determine. `--columns` gives another
column for a letter; docs/sweeps_laws.md has each law's letters. Rows without a number in
a needed column are left out and counted.
"""

import argparse
import csv
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moejax import files
from moejax.cli import flags as cli
from moejax.errors import UserError, did_you_mean

COLUMNS: Mapping[str, Mapping[str, str]] = {
  "power": {"C": "C"},
  "chinchilla": {"N": "N_active", "D": "tokens"},
  "clark": {"N": "N_active", "E": "num_experts"},
  "krajewski": {"N": "N_total", "D": "tokens", "G": "granularity"},
  "abnar": {"N": "N_total", "D": "tokens", "S": "sparsity"},
  "ludziejewski": {"N": "N_active", "D": "tokens", "E": "num_experts"},
}
"""Column of each letter, by law. `Ling` predicts no loss and is left out."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Parses the command line; prints --help and exits."""
  parser = cli.Parser(__doc__)
  parser.add_argument("results", type=pathlib.Path, help="the CSV file")
  parser.add_argument("--law", choices=list(COLUMNS), default="power", help="which law")
  parser.add_argument("--fix", default="", help="given constants: name=value,...")
  parser.add_argument("--columns", default="", help="other columns: letter=column,...")
  parser.add_argument("--loss", default="loss", help="column of the loss, nats per token")
  parser.add_argument(
    "--evaluation",
    default="",
    help="evaluation that gave the loss, with --law=power; default: the name of --loss",
  )
  parser.add_argument("--level", type=float, default=0.9, help="level of the intervals")
  parser.add_argument("--draws", type=int, default=400, help="bootstrap samples; 0: none")
  parser.add_argument(
    "--delta", type=float, default=0.01, help="threshold of the Huber loss, in log loss"
  )
  parser.add_argument(
    "--seed", type=int, default=0, help="random seed of the bootstrap and folds"
  )
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  return parser.parse_args(argv)


def read_columns(
  path: pathlib.Path, names: Sequence[str]
) -> tuple[dict[str, list[float]], int]:
  """Returns columns of a CSV file, and how many rows lacked a number in one of them.

  Raises:
    UserError: the file cannot be read, lacks a column, or has no usable row.
  """
  try:
    with files.open_regular(path) as file:
      text = file.read().decode("utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path} cannot be read: {error}.") from error
  table = csv.DictReader(text.splitlines())
  header = table.fieldnames or []
  for name in names:
    if name not in header:
      remedy = did_you_mean(name, header) if header else "It is empty."
      raise UserError(f"{path} has no column {name}. {remedy} --columns names another.")
  columns: dict[str, list[float]] = {name: [] for name in names}
  skipped = 0
  for row in table:
    values = [_number(row[name]) for name in names]
    if all(math.isfinite(value) for value in values):
      for name, value in zip(names, values):
        columns[name].append(value)
    else:
      skipped += 1
  if not columns[names[0]]:
    raise UserError(f"{path} has no row with numbers in {', '.join(names)}.")
  return columns, skipped


def _number(text: str | None) -> float:
  try:
    return float(text or "nan")
  except ValueError:
    return math.nan


def _pairs(flag: str, given: str) -> dict[str, str]:
  pairs = {}
  for item in given.split(",") if given else ():
    name, equals, value = item.partition("=")
    if not (name and equals and value):
      raise UserError(f"--{flag}={item}: write name=value, separated by commas.")
    pairs[name] = value
  return pairs


def _constants(given: str) -> dict[str, float]:
  constants = {name: _number(value) for name, value in _pairs("fix", given).items()}
  for name, value in constants.items():
    if not math.isfinite(value):
      raise UserError(f"--fix={name}=...: it needs a number.")
  return constants


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(sys.argv[1:] if argv is None else argv)
  if args.draws < 0 or args.seed < 0:
    raise UserError("--draws and --seed must be at least 0.")
  from moejax.sweep.laws import fit
  from moejax.sweep.laws import published as laws

  law = laws.by_name(args.law)
  letters = dict(COLUMNS[args.law])
  for letter, column in _pairs("columns", args.columns).items():
    if letter not in letters:
      remedy = did_you_mean(letter, letters)
      raise UserError(f"--columns={letter}: {args.law} has no such letter. {remedy}")
    letters[letter] = column
  table, skipped = read_columns(args.results, [*letters.values(), args.loss])
  settings = {}
  if law is laws.PowerLaw:
    settings["evaluation"] = args.evaluation or args.loss
  fitted = fit.fit(
    law,
    {letter: table[column] for letter, column in letters.items()},
    table[args.loss],
    fixed=_constants(args.fix),
    delta=args.delta,
    num_draws=args.draws,
    level=args.level,
    seed=args.seed,
    **settings,
  )
  if args.json:
    print(json.dumps(as_json(fitted) | {"rows_left_out": skipped}, indent=2))
  else:
    show(fitted, letters, skipped)


def as_json(fitted: Any) -> dict[str, Any]:
  """Returns a fit without its draws, as JSON values; nan becomes null."""
  return {
    "law": type(fitted.law).__name__,
    "constants": fitted.law.constants,
    "fixed": list(fitted.fixed),
    "intervals": {name: list(span) for name, span in fitted.intervals.items()},
    "level": fitted.level,
    "ranges": {name: list(span) for name, span in fitted.law.ranges.items()},
    "error": fitted.error,
    "r2": _finite(fitted.r2),
    "points": fitted.num_points,
    "rows": fitted.num_rows,
    "held_out": [
      {"how": h.how, "points": h.num_points, "error": h.error, "r2": _finite(h.r2)}
      for h in fitted.held_out
    ],
    "notes": list(fitted.notes),
  }


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None


def show(fitted: Any, letters: Mapping[str, str], skipped: int) -> None:
  """Prints constants, definitions, errors and notes."""
  console = Console()
  console = console if console.is_terminal else Console(width=100)
  console.print(
    f"{type(fitted.law).__name__}: {fitted.num_points} settings, {fitted.num_rows} rows, "
    f"{fitted.num_parameters} fitted constants"
  )
  table = Table(box=box.SIMPLE_HEAD)
  for header in ("constant", "value", f"{fitted.level:.0%} interval"):
    table.add_column(header, justify="right")
  for name, value in fitted.law.constants.items():
    words = "fixed" if name in fitted.fixed else "-"
    if name in fitted.intervals:
      words = "{:.4g} to {:.4g}".format(*fitted.intervals[name])
    table.add_row(name, f"{value:.4g}", words)
  console.print(table)
  for letter, (low, high) in fitted.law.ranges.items():
    meaning = f"{letter} is {letters[letter]}, {low:.4g} to {high:.4g}; the law's is "
    console.print(meaning + fitted.law.definitions[letter])
  errors = [f"fitted rows {fitted.error:.2%}"]
  errors += [f"held out, {h.how} ({h.num_points}) {h.error:.2%}" for h in fitted.held_out]
  console.print("Relative error: " + "; ".join(errors) + ".")
  if not fitted.held_out:
    console.print("Too few settings to hold any out.")
  for note in fitted.notes:
    console.print(f"Note: {note}.")
  if skipped:
    console.print(f"Rows left out for lack of a number: {skipped}.")


def run() -> None:
  """Runs the program."""
  try:
    main()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


if __name__ == "__main__":
  run()
