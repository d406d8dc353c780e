"""The tables of a report, as plain rows: settings, runs, effects, capacity, budgets.

On disk, each is a CSV file and a LaTeX table in the style of booktabs. results.csv has
every column of every run; these tables have those worth printing.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from moejax import files
from moejax.options import show
from moejax.sweep.report import analyses, capacity, evaluated, quality, summary
from moejax.sweep.report.charts import word
from moejax.sweep.report.records import Records
from moejax.sweep.report.summary import Interval, Setting

DIGITS = 4
"""Significant digits of a printed number other than a loss."""

_LARGE = 1e9
"""Size from which whole numbers are rounded too."""

_LOSSES = ("loss", "effect", "bits_per_byte", "standard error")

_MEASURED = (
  "active_parameters",
  "flops_per_token",
  "training_flops",
  "bits_per_byte",
  "dropped_tail",
  "max_load",
  "router_entropy",
  "step_ms_p50",
  "tokens_per_second",
)
"""Columns whose mean over seeds is in the table of settings."""

_OF_A_RUN = ("run", "state", "seed", "steps", "loss", "train_loss", *_MEASURED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """Rows of equal keys; None is an empty cell."""

  name: str
  """File name without its suffix."""
  title: str
  rows: tuple[Mapping[str, Any], ...]

  @property
  def columns(self) -> tuple[str, ...]:
    """The keys of the rows, without those that are empty in every row."""
    names = self.rows[0] if self.rows else ()
    return tuple(n for n in names if any(row[n] is not None for row in self.rows))


def make(records: Records, found: Sequence[Setting], axes: Sequence[str]) -> list[Table]:
  """Returns the tables that have rows."""
  names = summary.short_names(records.fields)
  tables = [
    _settings(records, found, names),
    _runs(records, names),
    _effects(found, axes, names),
    _evaluated(found, records, names),
    _capacity(records, found, axes, names),
    _isoflops(found, records.fields, names),
    _quality(found, records, names),
  ]
  return [table for table in tables if table.rows]


def cell(name: str, value: Any) -> str:
  """Returns a cell's text: losses with four decimals, other numbers with four digits.

  Args:
    name: of the column.
    value: None gives an empty cell.
  """
  if value is None:
    return ""
  if isinstance(value, float):
    is_loss = any(word in name for word in _LOSSES) or name in ("sd", "se")
    if is_loss:
      return f"{value:.4f}"
    whole = value.is_integer() and abs(value) < _LARGE
    return f"{value:.0f}" if whole else f"{value:.{DIGITS}g}"
  return show(value)


def _words(
  values: Mapping[str, Any], names: Mapping[str, str], fields: Sequence[str]
) -> dict[str, Any]:
  """Returns the fields' values as words; None if a field does not apply."""
  return {names[f]: _setting(f, values[f]) if f in values else None for f in fields}


def _setting(field: str, value: Any) -> Any:
  # A number stays one, so that a column sorts by size.
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return value if is_number else word(field, value)


def _interval(interval: Interval | None, name: str) -> dict[str, Any]:
  level = f"{summary.LEVEL:.0%}"
  return {
    name: interval.estimate if interval else None,
    f"{name}, {level} low": interval.low if interval else None,
    f"{name}, {level} high": interval.high if interval else None,
  }


def _settings(
  records: Records, found: Sequence[Setting], names: Mapping[str, str]
) -> Table:
  rows = [
    _words(s.values, names, records.fields)
    | {"seeds": s.n, "loss": s.mean, "sd": s.sd, "se": s.se}
    | {column: s.of(column) for column in _MEASURED}
    for s in found
  ]
  return Table(name="settings", title="Settings, means over seeds", rows=tuple(rows))


def _runs(records: Records, names: Mapping[str, str]) -> Table:
  rows = [
    _words(run.settings, names, records.fields)
    | {column: run.values.get(column) for column in _OF_A_RUN}
    for run in records.runs
  ]
  return Table(name="runs", title="Runs", rows=tuple(rows))


def _effects(
  found: Sequence[Setting], axes: Sequence[str], names: Mapping[str, str]
) -> Table:
  rows = [
    {"axis": names[e.axis], "level": word(e.axis, e.level)}
    | _interval(e.effect, "effect")
    | {"seeds": e.effect.n, "combinations": e.cells}
    for e in analyses.main_effects(found, axes)
  ]
  return Table(name="main_effects", title="Main effects on the loss", rows=tuple(rows))


def _quality(
  found: Sequence[Setting], records: Records, names: Mapping[str, str]
) -> Table:
  rows = []
  for answer in quality.speedups(found):
    row = _words(answer.setting.values, names, records.fields)
    row |= {"seeds": answer.setting.n, "loss of the dense twin": answer.steps.target}
    row |= {"bound": answer.steps.bound}
    for name, speedup in (
      ("steps", answer.steps),
      ("FLOPs", answer.flops),
      ("time", answer.time),
    ):
      level = f"{summary.LEVEL:.0%}"
      row |= {
        f"{name}, times fewer": speedup.ratio if speedup else None,
        f"{name}, {level} low": quality.finite(speedup.low) if speedup else None,
        f"{name}, {level} high": quality.finite(speedup.high) if speedup else None,
      }
    rows.append(row)
  return Table(
    name="speed_to_quality",
    title="Cost to the dense twin's final loss",
    rows=tuple(rows),
  )


def _evaluated(
  found: Sequence[Setting], records: Records, names: Mapping[str, str]
) -> Table:
  rows = [
    _words(setting.values, names, records.fields)
    | {"evaluation": name, "seeds": setting.n}
    | {"loss": setting.mean, "sd": setting.sd, "se": setting.se}
    | {"dropped": evaluated.drops(setting, name)}
    for name in evaluated.names(found)
    for setting in evaluated.settings(found, name)
  ]
  title = "Other evaluations, split@capacity factor, means over seeds"
  return Table(name="evaluations", title=title, rows=tuple(rows))


def _capacity(
  records: Records,
  found: Sequence[Setting],
  axes: Sequence[str],
  names: Mapping[str, str],
) -> Table:
  others = [axis for axis in axes if axis != analyses.CAPACITY]
  diverged = [run.settings for run in summary.diverged(records)]
  rows = [
    _words(answer.others, names, others)
    | {
      "sufficient capacity factor": answer.sufficient.values[analyses.CAPACITY]
      if answer.sufficient
      else f"not {answer.largest:g}, the largest",
      "its loss": answer.sufficient.mean if answer.sufficient else None,
      "dropless loss": answer.dropless.mean,
      "standard error": answer.margin,
    }
    for answer in capacity.sufficient(found, axes, diverged)
    if answer.dropless is not None
    and (answer.sufficient is not None or not answer.refused)
  ]
  title = "Capacity factor from which on all are within one standard error of dropless"
  return Table(name="capacity", title=title, rows=tuple(rows))


def _isoflops(
  found: Sequence[Setting], fields: Sequence[str], names: Mapping[str, str]
) -> Table:
  curves = analyses.isoflops(found, fields)
  others = [field for field in fields if any(field in c.others for c in curves)]
  rows = [
    _words(curve.others, names, others)
    | {"training FLOPs": curve.budget, "sizes": len(curve.sizes)}
    | _interval(curve.minimum, "best active parameters")
    | {"loss there": curve.loss, "refused": curve.refused or None}
    for curve in curves
  ]
  return Table(name="isoflop", title="Best size per budget", rows=tuple(rows))


def frame(table: Table) -> Any:
  """Returns a pandas frame of the cells' text."""
  import pandas

  rows = [[cell(name, row[name]) for name in table.columns] for row in table.rows]
  return pandas.DataFrame(rows, columns=list(table.columns), dtype=object)


def remove_others(directory: pathlib.Path, tables: Sequence[Table]) -> None:
  """Removes the tables of earlier reports, recognised by their label."""
  names = {table.name for table in tables}
  for latex in directory.glob("*.tex"):
    if latex.stem not in names and _label(latex.stem) in latex.read_text("utf-8"):
      latex.unlink()
      latex.with_suffix(".csv").unlink(missing_ok=True)


def _label(name: str) -> str:
  return rf"\label{{tab:{name}}}"


def write(directory: pathlib.Path, tables: Sequence[Table]) -> list[pathlib.Path]:
  """Writes NAME.csv and NAME.tex of each table into an existing directory."""
  written = []
  for table in tables:
    sheet = frame(table)
    latex = sheet.to_latex(
      index=False, escape=True, caption=table.title, label=f"tab:{table.name}"
    )
    for suffix, text in ((".csv", sheet.to_csv(index=False)), (".tex", latex)):
      written.append(directory / (table.name + suffix))
      files.write_text(written[-1], text)
  return written
