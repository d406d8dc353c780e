"""Numbers in prose that a command prints: as many as there are."""

import re
from pathlib import Path

from moejax.routing.registry import ROUTERS
from tools.mutants import MUTANTS

ROOT = Path(__file__).parents[1]


def test_readme_counts_what_there_is():
  """Routers as --list=routers has them, and the edits that tools.mutation_check makes."""
  readme = (ROOT / "README.md").read_text()
  assert re.findall(r"\[(\d+) routers\]", readme) == [str(len(ROUTERS))]
  assert re.findall(r"in (\d+) ways", readme) == [str(len(MUTANTS))]


def test_links_between_pages_lead_somewhere():
  """Every relative link of README and docs names a file that is there."""
  for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
    for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
      assert (page.parent / target).exists(), f"{page.name} links to {target}"
