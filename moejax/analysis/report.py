"""Writes an analysis: analysis.json, figures and a page that needs no network."""

import pathlib
from typing import Any

from moejax.run import results

FILE = "analysis.json"


def write(found: dict[str, Any], out: pathlib.Path) -> list[pathlib.Path]:
  """Writes all files, each whole or not at all; returns their paths."""
  results.write(out / FILE, found)
  return [out / FILE]
