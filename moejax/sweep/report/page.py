"""The report of runs: one offline page, and every figure and table as a file.

    results.csv, .json, .parquet   one row per run (`records`)
    report.html                    sentences, figures and tables; no network, any browser
    figures/NAME.png, .pdf         each figure
    figures/captions.md            what each figure shows, and the meaning of its bars
    tables/NAME.csv, .tex          each table

Files of an earlier report that this one does not make are removed; other files stay.
Equal runs give an equal page, byte for byte: it contains no date and no random name. The
page includes the libraries that draw it: Vega-Lite for figures, DataTables for tables.
"""

import importlib.util
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moejax import files
from moejax.config import Config
from moejax.errors import UserError
from moejax.options import show
from moejax.sweep.report import records as records_lib
from moejax.sweep.report import sentences, summary
from moejax.sweep.report.records import Records

PAGE_FILE = "report.html"
FIGURES, TABLES = "figures", "tables"
CAPTIONS_FILE = "captions.md"

_NEEDS = ("altair", "vl_convert", "itables", "pandas", "jinja2")
"""Modules of the extra `report`."""

_TEMPLATE = "page.html"


def write(
  workdir: pathlib.Path | str,
  run_dirs: Iterable[pathlib.Path | str],
  title: str,
  notes: str = "",
  timing: Mapping[str, Any] | None = None,
  *,
  axes: Sequence[str] = (),
  states: Mapping[str, str] | None = None,
  variants: Mapping[str, str] | None = None,
  base: Config | None = None,
) -> sentences.Sentences:
  """Writes the results and the report of runs.

  Args:
    workdir: existing directory for the files.
    run_dirs: directories of training runs, in any state.
    title: of the page.
    notes: paragraphs below the title.
    timing: content of timing.json; see `records.read`.
    axes: the fields that were varied, most important first; if empty, they are found.
    states: the scheduler's word for runs that are not done, by directory name.
    variants: names of settings, by directory name.
    base: the config that `train` uses without flags, for the command to copy.

  Returns:
    The page's sentences.

  Raises:
    UserError: a run cannot be read (nothing is written), or the extra `report` is not
      installed (only the results are written).
  """
  workdir = pathlib.Path(workdir)
  records = records_lib.read(run_dirs, timing=timing, states=states, variants=variants)
  records_lib.write(workdir, records)
  found = summary.settings(records)
  axes = checked_axes(records, axes) or summary.axes(found, records.fields)
  said = sentences.write(records, found, axes, base)
  _check_extra(workdir)
  draw(workdir, records, found, axes, said, title, notes)
  return said


def checked_axes(records: Records, given: Sequence[str]) -> tuple[str, ...]:
  """Returns the given axes in which the runs differ, as full field names.

  Args:
    records: the runs.
    given: dotted names.
  """
  return tuple(name for name in given if name in records.fields)


class MissingExtraError(UserError):
  """The results were written, but the page needs packages that are not installed."""


def _check_extra(workdir: pathlib.Path) -> None:
  missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
  if missing:
    raise MissingExtraError(
      f"Wrote {workdir / records_lib.CSV_FILE}, but not the page and the figures: they "
      f"need {', '.join(missing)}. Install them with: pip install 'moejax[report]'."
    )


def draw(
  workdir: pathlib.Path,
  records: Records,
  found: Sequence[summary.Setting],
  axes: Sequence[str],
  said: sentences.Sentences,
  title: str,
  notes: str = "",
) -> None:
  """Writes the page, the figures and the tables; needs the extra `report`."""
  # These modules import the extra's packages.
  from moejax.sweep.report import charts, figures, tables

  drawn = figures.make(records, found, axes)
  sheets = tables.make(records, found, axes)
  for name in (FIGURES, TABLES):
    (workdir / name).mkdir(exist_ok=True)
  tables.write(workdir / TABLES, sheets)
  tables.remove_others(workdir / TABLES, sheets)
  captions = workdir / FIGURES / CAPTIONS_FILE
  before = _captioned(captions)
  for figure in drawn:
    charts.save(figure, workdir / FIGURES)
  files.write_text(captions, _captions(records, drawn))
  for name in before - {figure.name for figure in drawn}:
    for suffix in charts.SUFFIXES:
      (workdir / FIGURES / (name + suffix)).unlink(missing_ok=True)
  text = page(records, said, drawn, sheets, title, notes)
  files.write_text(workdir / PAGE_FILE, text)


def _captioned(captions: pathlib.Path) -> set[str]:
  """Returns the names of the figures that an earlier report wrote with its captions."""
  text = captions.read_text(encoding="utf-8") if captions.is_file() else ""
  return set(re.findall(r"^\*\*(\w+)\*\*: ", text, re.MULTILINE))


def _captions(records: Records, drawn: Sequence[Any]) -> str:
  entries = [f"**{f.name}**: {f.title}. {f.caption}" for f in drawn]
  return "\n\n".join([_facts(records), *entries]) + "\n"


def page(
  records: Records,
  said: sentences.Sentences,
  drawn: Sequence[Any],
  sheets: Sequence[Any],
  title: str,
  notes: str = "",
) -> str:
  """Returns the HTML page; every text in it is escaped.

  Args:
    records: all runs.
    said: sentences.
    drawn: from `figures.make`.
    sheets: from `tables.make`.
    title: plain text.
    notes: plain text; line breaks are kept.
  """
  import jinja2
  import markupsafe

  from moejax.sweep.report import charts

  topics = itertools.groupby(said.findings, key=lambda finding: finding.topic)
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(_TEMPLATE).render(
    title=title,
    notes=notes.strip(),
    facts=_facts(records),
    findings=[(topic, list(group)) for topic, group in topics],
    unknown=said.unknown,
    figures=drawn,
    specs={figure.name: charts.page_spec(figure) for figure in drawn},
    sheets=[
      {"name": t.name, "title": t.title, "html": markupsafe.Markup(_sheet(t))}
      for t in sheets
    ],
    equal=_equal(records),
    chart_library=markupsafe.Markup(charts.library()),
    table_library=markupsafe.Markup(_table_library()),
  )


def _facts(records: Records) -> str:
  done = sum(run.done for run in records.runs)
  seeds = {run.values["seed"] for run in records.runs}
  by = f", differing in {', '.join(records.fields)}" if records.fields else ""
  return (
    f"{_many(len(records.runs), 'run')}, {done} done, {_many(len(seeds), 'seed')}{by}."
  )


def _many(number: int, noun: str) -> str:
  return f"{number} {noun}{'' if number == 1 else 's'}"


def _equal(records: Records) -> str:
  """Returns the columns with one value in all runs, and that value."""
  names = ("num_steps", "eval_tokens", "devices", "step_time_source", "dataset")
  out = []
  for name in (*names, "revision"):
    values = {run.values.get(name) for run in records.runs}
    if len(values) == 1 and None not in values:
      out.append(f"{name} {show(values.pop())}")
  return ", ".join(out)


def _sheet(table: Any) -> str:
  """Returns a sortable, filterable table, without the library."""
  import itables

  from moejax.sweep.report import tables

  options: dict[str, Any] = {
    "connected": False,
    "table_id": f"table-{table.name}",
    "display_logo_when_loading": False,
    "showIndex": False,
    # A click on a header sorts, as expected.
    "text_in_header_can_be_selected": False,
    # No limit: every run is on the page.
    "maxBytes": 0,
    "classes": "display compact nowrap",
    "column_filters": "footer",
    "layout": {"topStart": "search", "topEnd": "pageLength", "bottomEnd": "paging"},
    "lengthMenu": [25, 100, {"label": "all", "value": -1}],
    "style": "width:100%;margin:0",
  }
  return itables.to_html_datatable(tables.frame(table), **options)


def _table_library() -> str:
  import itables
  from itables.javascript import generate_init_offline_itables_html

  bundle = pathlib.Path(itables.__file__).parent / "html" / "dt_bundle.js"
  return generate_init_offline_itables_html(bundle)
