"""docs/conventions.md says under which options each recorded output is reproduced."""

import fnmatch
import json
import re
from pathlib import Path

from moejax.config import MoEConfig
from moejax.routing.registry import ROUTERS, options_by_name

ROOT = Path(__file__).parents[2]


def rows() -> list[list[str]]:
  text = (ROOT / "docs/conventions.md").read_text().split("## Recorded outputs")[1]
  lines = [line for line in text.splitlines() if line.startswith("| ")]
  return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_recorded_entry_has_a_row_and_every_row_an_entry():
  """Entries by name or pattern; routers and options are ones that there are."""
  lines = (ROOT / "tests/golden/routing/index.jsonl").read_text().splitlines()
  entries = {json.loads(line)["entry"] for line in lines}
  found = set()
  for recorded, router, options in rows():
    for pattern in recorded.split(", "):
      matched = set(fnmatch.filter(entries, pattern))
      assert matched, f"{pattern} is in the table and nowhere else"
      found |= matched
    assert set(router.split(", ")) <= set(ROUTERS), router
    for name in re.findall(r"(\w+)=", options):
      # The losses of Tutel are called with arguments, and K is num_selected.
      own = {option for r in router.split(", ") for option in options_by_name(r)}
      known = name in ("ddof", "excluding", "K") or hasattr(MoEConfig(), name)
      known = known or name in own
      assert known, f"{name} is no option"
  assert found == entries, f"no row for {sorted(entries - found)}"
