"""The trips of docs/architecture.md: what a token and a batch meet."""

import pathlib
import re

import pytest

from tools import trips

ROOT = pathlib.Path(__file__).parents[2]


def listed(heading: str) -> list[str]:
  """Files in the first column of the table under a heading."""
  page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
  section = page.split(f"## {heading}")[1].split("\n## ")[0]
  return re.findall(r"^\| \**`([\w/]+\.py)`", section, flags=re.MULTILINE)


def test_a_token_meets_the_files_of_the_page_and_no_others():
  """As a set: which helper is called first says nothing."""
  files = trips.token()
  assert set(files) == set(listed("One token through an MoE layer"))
  assert "all_to_all" in files["exchange/all_to_all.py"]
  page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
  assert f"That is {len(files)} files" in page


@pytest.mark.slow
def test_a_batch_meets_the_stops_of_the_page():
  """Every stop is passed, and the total is what the page calls "some 85 files"."""
  files = trips.batch()
  stops = listed("One batch, from text to a checkpoint")
  assert len(stops) == 12
  assert set(stops) <= set(files)
  assert 81 <= len(files) <= 89
