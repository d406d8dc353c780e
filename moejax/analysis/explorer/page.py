"""The explorer: one HTML file that needs no network, from an analysis and a sample.

Data are compressed columns in base64 (`pack`), which contain no markup for any text;
everything else that is written into the page is escaped. The scripts next to this file
are plain JavaScript and are copied into the page unchanged.
"""

import html
import importlib.util
import pathlib
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moejax.analysis.explorer import facts, pack
from moejax.analysis.explorer.facts import Names
from moejax.analysis.explorer.sample import Sample
from moejax.analysis.sentences import left_out

SCRIPTS = ["data", "state", "text", "token", "card", "marks", "charts", "plots", "main"]
"""In this order they make one module; each describes its content in its first lines."""

_HERE = pathlib.Path(__file__).parent
_DIFFERENCES = ("gate", "sequence")
"""Columns with similar neighbouring rows: weights by rank, and numbers of sequences."""


def library() -> str | None:
  """Returns the scripts of Vega-Lite; None if the extra `report` is not installed."""
  if any(importlib.util.find_spec(name) is None for name in ("altair", "vl_convert")):
    return None
  from moejax.sweep.report import charts

  return charts.library()


def blobs(
  found: dict[str, Any], sample: Sample | None, names: Names
) -> Iterator[tuple[str, str]]:
  """Yields the name and packed content of all data that the page reads."""
  yield "facts", pack.pack_json(facts.facts(found, sample, names))
  yield "matrices", pack.pack(facts.matrices(found))
  if sample is None:
    return
  columns = facts.text_columns(sample, names.pieces)
  yield "text", pack.pack(columns, differences=_DIFFERENCES)
  for index in range(len(sample.expert)):
    columns = facts.layer_columns(sample, index, found["num_experts"])
    yield f"layer{index}", pack.pack(columns, differences=_DIFFERENCES)


def render(
  found: dict[str, Any],
  sentences: Sequence[str],
  sample: Sample | None,
  names: Names,
  pictures: Mapping[str, str],
) -> str:
  """Returns the page.

  Args:
    found: content of analysis.json.
    sentences: of the first screen.
    sample: tokens to be shown; None for a page without text.
    names: of ids.
    pictures: HTML of figures, for a page without the library that draws them.
  """
  title = f"Routers of {pathlib.Path(found['workdir']).name}, step {found['step']}"
  drawing = library()
  data = dict(blobs(found, sample, names))
  if drawing is not None:
    data["library"] = pack.deflate(drawing.encode())
  template = string.Template(_read("page.html"))
  return template.substitute(
    title=html.escape(title),
    sentences="\n".join(f"<li>{_sentence(text)}</li>" for text in sentences),
    about=html.escape(_about(found)),
    table="".join(_table(found)),
    undefined="\n".join(_undefined(found)),
    pictures="" if drawing is not None else "\n".join(pictures.values()),
    style=_read("page.css"),
    data="\n".join(
      f'<script type="text/plain" id="data-{name}">{text}</script>'
      for name, text in data.items()
    ),
    script="\n".join(_read(f"{name}.js") for name in SCRIPTS),
  )


def _sentence(text: str) -> str:
  """Returns a sentence in HTML; flags in it are not broken over lines."""
  return re.sub(r"(--[a-z_]+)", r"<code>\1</code>", html.escape(text))


def _read(name: str) -> str:
  return (_HERE / name).read_text(encoding="utf-8")


def _about(found: dict[str, Any]) -> str:
  stacks = found.get("stacks", {"": found})
  routers = "; ".join(
    f"{name + ': ' if name else ''}{own['router']}, {own['num_selected']} of "
    f"{own['num_experts']} experts, {own['tokens']:,} tokens"
    for name, own in stacks.items()
  )
  loss = "" if found["loss"] is None else f", loss {found['loss']:.4f} nats/token"
  return (
    f"{routers} of {found['text'] or found['split']}; {len(found['layers'])} MoE layers"
    f"{loss}. {left_out(found)}"
  ).rstrip()


def _undefined(found: dict[str, Any]) -> Iterator[str]:
  for measure, reason in found["undefined"].items():
    yield f"<p>No {html.escape(measure)}: {html.escape(reason)}.</p>"


def _table(found: dict[str, Any]) -> Iterator[str]:
  """Yields a table with a row for each MoE layer."""
  headers = ("layer", "max load", "min load", "dead", "entropy of a choice", "margin")
  head = "".join(f'<th scope="col">{text}</th>' for text in (*headers, "tied"))
  yield f"<table><thead><tr>{head}</tr></thead><tbody>"
  for layer in found["layers"]:
    load, choices = layer["load"], layer["choices"]
    cells = [
      f"{load['max_ratio']:.2f}x",
      f"{load['min_ratio']:.2f}x",
      str(len(load["dead"])),
      f"{choices['entropy_fraction']:.0%} of max",
      f"{choices['margin']:.3f}" if "margin" in choices else "-",
      f"{choices['tied_fraction']:.2%}" if "tied_fraction" in choices else "-",
    ]
    row = "".join(f"<td>{text}</td>" for text in cells)
    yield f'<tr><th scope="row">{layer["layer"]}</th>{row}</tr>'
  yield "</tbody></table>"
