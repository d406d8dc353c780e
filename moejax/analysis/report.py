"""Writes an analysis: analysis.json, figures, and a page that needs no network."""

import base64
import html
import pathlib
from collections.abc import Iterator
from typing import Any

from moejax import files
from moejax.analysis import figures
from moejax.run import results

FILE, PAGE, FIGURES = "analysis.json", "index.html", "figures"

_CAPTIONS = {
  "load": "Load of each expert over an even load. Red experts are busy.",
  "drops": "Tokens that no expert computes, under the capacity of training.",
  "replay": "What other capacities and policies would have dropped.",
  "specialisation": "Preferences for words and domains. Only what is clearly above the "
  "dashed line is more than chance.",
  "coactivation": "Pairs of experts that compute the same tokens, over chance.",
  "flow": "Where an expert's tokens go in the next MoE layer.",
  "saturation": "Choices that earlier checkpoints share with the last one.",
  "consistency": "How few experts would do for a stretch of text.",
  "similarity": "Similarity of what experts compute for the same tokens.",
  "knockout": "Change of the loss when one expert is removed, with two standard errors.",
}

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8886; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; background: white; } figure { margin: 2rem 0; }
"""


def write(found: dict[str, Any], out: pathlib.Path) -> list[pathlib.Path]:
  """Writes all files, each whole or not at all; returns JSON and page."""
  drawn = figures.draw(found)
  results.write(out / FILE, found)
  for _ in figures.save(drawn, out / FIGURES):
    pass
  pictures = {name: figures.png(figure) for name, figure in drawn.items()}
  files.write_text(out / PAGE, page(found, pictures))
  return [out / FILE, out / PAGE]


def sentences(found: dict[str, Any]) -> list[str]:
  """Returns in at most three sentences what the analysis found first."""
  layers = found["layers"]
  uneven = max(layers, key=lambda layer: layer["load"]["max_ratio"])
  dead = sum(len(layer["load"]["dead"]) for layer in layers)
  said = [
    f"The fullest expert has {uneven['load']['max_ratio']:.2f} times an even load "
    f"(layer {uneven['layer']}), and {dead or 'no'} of "
    f"{len(layers) * found['num_experts']} experts never computed a token."
  ]
  worded = [layer for layer in layers if "words" in layer]
  if worded:
    top = max(worded, key=lambda layer: layer["words"]["input"]["favourite"])
    own = top["words"]["input"]
    said.append(
      f"Words have favourites: in layer {top['layer']} the favourite expert of a word "
      f"computes {own['favourite']:.0%} of its tokens, and {own['chance']:.0%} if "
      "assignments are shuffled."
    )
  if found.get("knockout"):
    cost, layer, expert = max(
      (delta, row["layer"], expert)
      for row in found["knockout"]
      for expert, delta in enumerate(row["delta"])
    )
    said.append(
      f"The expert whose removal costs most is {expert} of layer {layer}: "
      f"{cost:+.4f} nats per token."
    )
  else:
    said.append(
      "Which experts matter is not visible here: --knockout measures it, and no measure "
      "of the router has been found to predict it."
    )
  return said


def page(found: dict[str, Any], pictures: dict[str, bytes]) -> str:
  """Returns one HTML file with everything in it."""
  title = f"Routers of {pathlib.Path(found['workdir']).name}, step {found['step']}"
  about = (
    f"{found['router']}, {found['num_selected']} of {found['num_experts']} experts, "
    f"{len(found['layers'])} MoE layers; {found['tokens']:,} tokens of "
    f"{found['text'] or found['split']}, loss {found['loss']:.4f} nats/token."
  )
  parts = [
    f"<h1>{html.escape(title)}</h1>",
    f"<p>{html.escape(' '.join(sentences(found)))}</p>",
    f"<p>{html.escape(about)}</p>",
    *_table(found),
  ]
  for name, picture in pictures.items():
    data, caption = base64.b64encode(picture).decode(), html.escape(_CAPTIONS[name])
    parts.append(
      f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
      f"<figcaption>{caption}</figcaption></figure>"
    )
  for measure, reason in found["undefined"].items():
    parts.append(f"<p>No {html.escape(measure)}: {html.escape(reason)}.</p>")
  body = "\n".join(parts)
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
    f"<body>\n{body}\n</body></html>\n"
  )


def _table(found: dict[str, Any]) -> Iterator[str]:
  """Yields a table with a row for each MoE layer."""
  yield '<div class="wide"><table><tr>'
  headers = ("layer", "max load", "min load", "dead", "entropy of a choice", "margin")
  yield "".join(f"<th>{text}</th>" for text in (*headers, "tied"))
  for layer in found["layers"]:
    load, choices = layer["load"], layer["choices"]
    cells = [
      str(layer["layer"]),
      f"{load['max_ratio']:.2f}x",
      f"{load['min_ratio']:.2f}x",
      str(len(load["dead"])),
      f"{choices['entropy_fraction']:.0%} of max",
      f"{choices['margin']:.3f}" if "margin" in choices else "-",
      f"{choices['tied_fraction']:.2%}" if "tied_fraction" in choices else "-",
    ]
    yield "</tr><tr>" + "".join(f"<td>{text}</td>" for text in cells)
  yield "</tr></table></div>"
