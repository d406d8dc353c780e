"""Facts about each run, read from its directory alone, as one row of results.csv.

A run need not be part of a sweep: the directory of any training run will do. An
unfinished run is also a row, without the numbers that only a finished one has. Columns
are in `columns`.

    results.csv       the settings that differ between the runs, then the columns
    results.json      the same, with the columns' units and meanings
    results.parquet   the same, if pyarrow is installed
"""

import collections
import csv
import dataclasses
import importlib.util
import io
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moejax import files
from moejax.config import Config
from moejax.config import text as config_text
from moejax.options import show
from moejax.run import workdir as workdir_lib
from moejax.run import writers
from moejax.sweep.report import columns as columns_lib
from moejax.sweep.report import run_values
from moejax.sweep.report.columns import COLUMNS, Column
from moejax.sweep.report.run_values import DONE, Curve

CSV_FILE, JSON_FILE, PARQUET_FILE = "results.csv", "results.json", "results.parquet"
VARIANT = "variant"
"""Pseudo-field: the name of a setting."""

COPY = "copy"
"""Pseudo-field that distinguishes runs of one config and seed: 1, 2 and so on."""

_NO_SETTINGS = frozenset(
  name
  for name in workdir_lib.MAY_CHANGE
  if name.startswith(("data.", "train.", "schema_version"))
) | {"train.seed"}
"""Fields that do not cause a result: the seed, and what is logged, saved or cached."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """One run."""

  path: pathlib.Path
  config: Config
  values: Mapping[str, Any]
  """Values by column; absent if unknown."""
  evaluations: Mapping[str, tuple[float, float | None]]
  """`validation@1.25` and the like to loss (nats per token) and dropped fraction."""
  curve: Curve
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Each of `Records.fields` that the run has; options of other routers are absent."""

  @property
  def done(self) -> bool:
    return self.values["state"] == DONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
  """Runs, and the fields in which they differ."""

  runs: tuple[Record, ...]
  fields: tuple[str, ...]
  """Dotted names, most important first; never the seed."""

  @property
  def columns(self) -> tuple[Column, ...]:
    """Columns in which at least one run has a value, evaluations last."""
    found = [c for c in COLUMNS if any(c.name in run.values for run in self.runs)]
    for name in evaluation_names(self.runs):
      found += columns_lib.evaluation_columns(name)
    return tuple(found)

  def rows(self) -> list[dict[str, Any]]:
    """Returns one dict per run with every field and column; None means unknown."""
    rows = []
    for run in self.runs:
      row: dict[str, Any] = {name: run.settings.get(name) for name in self.fields}
      row |= {c.name: run.values.get(c.name) for c in self.columns}
      for name, (loss, dropped) in run.evaluations.items():
        row |= {f"loss_{name}": loss, f"dropped_{name}": dropped}
      rows.append(row)
    return rows


def read(
  run_dirs: Iterable[pathlib.Path | str],
  *,
  timing: Mapping[str, Any] | None = None,
  states: Mapping[str, str] | None = None,
  variants: Mapping[str, str] | None = None,
) -> Records:
  """Reads runs and finds the fields in which they differ.

  Args:
    run_dirs: directories of training runs, in any state.
    timing: content of timing.json: entries with `runs` (directory names) and the times
      of their step, which replace those logged while training.
    states: the scheduler's word for a run that is not done, by directory name.
    variants: names of settings, by directory name; a name replaces the fields that it
      determines.

  Raises:
    UserError: a directory has no run, or one of its files is damaged.
  """
  runs = [_read(pathlib.Path(path), timing or {}, states or {}) for path in run_dirs]
  return with_settings(runs, variants or {})


def with_settings(
  runs: Sequence[Record], variants: Mapping[str, str] | None = None
) -> Records:
  """Finds the fields in which runs differ, and adds their values to each run.

  Args:
    runs: without settings.
    variants: see `read`.
  """
  leaves = [config_text.leaves(run.config) for run in runs]
  if variants:
    leaves = _by_variant(leaves, [variants.get(run.path.name, "") for run in runs])
  names = dict.fromkeys(name for found in leaves for name in found)
  fields = [name for name in names if name not in _NO_SETTINGS and _differs(leaves, name)]
  fields.sort(key=_importance)
  out, seen = [], collections.Counter[Any]()
  for run, found in zip(runs, leaves, strict=True):
    settings = {name: found[name] for name in fields if name in found}
    key = (tuple(settings.items()), run.values.get("seed"))
    seen[key] += 1
    settings[COPY] = seen[key]
    out.append(settings)
  if max(seen.values(), default=1) > 1:
    fields.append(COPY)
  kept = [{n: v for n, v in settings.items() if n in fields} for settings in out]
  runs = [dataclasses.replace(r, settings=s) for r, s in zip(runs, kept, strict=True)]
  return Records(runs=tuple(runs), fields=tuple(fields))


def _by_variant(
  leaves: Sequence[Mapping[str, Any]], variants: Sequence[str]
) -> list[dict[str, Any]]:
  """Replaces the fields that have one value in each variant by the variant's name."""
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for variant, found in zip(variants, leaves, strict=True):
    groups.setdefault(variant, []).append(found)
  names = {name for found in leaves for name in found}
  free = {n for n in names if any(_differs(group, n) for group in groups.values())}
  return [
    {VARIANT: variant} | {name: value for name, value in found.items() if name in free}
    for variant, found in zip(variants, leaves, strict=True)
  ]


def _differs(leaves: Sequence[Mapping[str, Any]], name: str) -> bool:
  values = [found[name] for found in leaves if name in found]
  return any(value != values[0] for value in values)


_FIRST = (
  VARIANT,
  "moe.dense_twin",
  "moe.router",
  "moe.num_experts",
  "moe.num_selected",
  "moe.segments",
  "moe.capacity_factor",
)


def _importance(name: str) -> tuple[int, int]:
  """Returns a sort key: fields that a sweep varies come before those that follow from
  them, else as in the schema."""
  first = _FIRST.index(name) if name in _FIRST else len(_FIRST)
  return first, int(name in ("moe.hidden", "train.num_steps"))


def evaluation_names(runs: Iterable[Record]) -> list[str]:
  """Returns the evaluations that any run has: by split, ascending, dropless last."""
  found = {name for run in runs for name in run.evaluations}

  def key(name: str) -> tuple[str, float]:
    split, _, factor = name.partition("@")
    return split, math.inf if factor == "dropless" else float(factor)

  return sorted(found, key=key)


def _read(
  path: pathlib.Path, timing: Mapping[str, Any], states: Mapping[str, str]
) -> Record:
  config = workdir_lib.read_config(path)
  found = run_values.read(path, config, timing)
  values = found.values
  if values["state"] != run_values.DONE:
    values |= {"state": states.get(path.name, values["state"])}
  return Record(
    path=path,
    config=config,
    values=values,
    evaluations=found.evaluations,
    curve=found.curve,
  )


def write(directory: pathlib.Path, records: Records) -> list[pathlib.Path]:
  """Writes results.csv, results.json and, with pyarrow, results.parquet, atomically."""
  rows = writers.finite(records.rows())
  text = io.StringIO()
  sheet = csv.writer(text, lineterminator="\n")
  names = [*records.fields, *(column.name for column in records.columns)]
  sheet.writerow(names)
  for run, row in zip(records.runs, rows, strict=True):
    sheet.writerow([_cell(run, name, row[name]) for name in names])
  files.write_text(directory / CSV_FILE, text.getvalue())
  content = {
    "fields": list(records.fields),
    "columns": [dataclasses.asdict(column) for column in records.columns],
    "rows": rows,
  }
  files.write_text(directory / JSON_FILE, json.dumps(content, indent=1) + "\n")
  written = [directory / CSV_FILE, directory / JSON_FILE]
  if importlib.util.find_spec("pyarrow") is not None:
    written.append(_write_parquet(directory / PARQUET_FILE, rows))
  return written


def _cell(run: Record, name: str, value: Any) -> Any:
  """Returns a cell: a setting as on the command line; empty if it does not apply."""
  if name in run.settings:
    return show(value)
  return "" if value is None else value


def _write_parquet(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
  import pyarrow
  from pyarrow import parquet

  with files.replacing(path) as temporary:
    parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
  return path
