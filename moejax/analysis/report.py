"""Writes an analysis: analysis.json, figures, and the explorer, one offline page."""

import base64
import html
import pathlib
from typing import Any

from moejax import files
from moejax.analysis import figures, sentences
from moejax.analysis.explorer import page
from moejax.analysis.explorer.facts import Names
from moejax.analysis.explorer.sample import Sample
from moejax.run import results

FILE, PAGE, FIGURES = "analysis.json", "index.html", "figures"

_CAPTIONS = {
  "load": "Load of each expert over an even load. Busy experts are red.",
  "drops": "Tokens that no expert computes, under the capacity of training.",
  "replay": "What other capacities and policies would have dropped.",
  "specialisation": "Preferences for words and domains. Only what is clearly above the "
  "dashed line is more than chance.",
  "coactivation": "Pairs of experts that compute the same tokens, over chance.",
  "flow": "Where an expert's tokens go in the next MoE layer.",
  "saturation": "Choices that earlier checkpoints share with the last one.",
  "consistency": "How few experts suffice for a stretch of text.",
  "similarity": "Similarity of what experts compute for the same tokens.",
  "knockout": "Change of the loss when one expert is removed, ± two standard errors.",
}


def write(
  found: dict[str, Any],
  out: pathlib.Path,
  sample: Sample | None = None,
  names: Names | None = None,
) -> list[pathlib.Path]:
  """Writes all files, each atomically; returns the paths of the JSON and the page.

  Args:
    found: the measures.
    out: directory, created if missing.
    sample: tokens that the page shows; None for a page without text.
    names: of ids in the sample.
  """
  out.mkdir(parents=True, exist_ok=True)
  drawn = figures.draw(found)
  results.write(out / FILE, found)
  for _ in figures.save(drawn, out / FIGURES):
    pass
  pictures = {name: _figure(name, figure) for name, figure in drawn.items()}
  said = sentences.sentences(found)
  files.write_text(
    out / PAGE, page.render(found, said, sample, names or Names(), pictures)
  )
  return [out / FILE, out / PAGE]


def _figure(name: str, figure: Any) -> str:
  data = base64.b64encode(figures.png(figure)).decode()
  caption = html.escape(_CAPTIONS[name])
  return (
    f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
    f"<figcaption>{caption}</figcaption></figure>"
  )
