"""Marks the tests of thorough.txt, and refuses a line that names none of them."""

import pathlib
from collections.abc import Iterable

import pytest

LIST = pathlib.Path(__file__).parent / "thorough.txt"


def listed() -> set[str]:
  """Returns the node ids of thorough.txt."""
  lines = LIST.read_text(encoding="utf-8").splitlines()
  return {line for line in lines if line and not line.startswith("#")}


def mark(items: Iterable[pytest.Item], *, whole_files: bool) -> None:
  """Marks the listed tests as `thorough`.

  Args:
    items: that were collected.
    whole_files: whether they are all tests of their files, so that a line about one of
      these files has to name one.
  """
  names, seen, files = listed(), set(), set()
  for item in items:
    function = item.nodeid.partition("[")[0]
    files.add(item.nodeid.partition("::")[0])
    if found := names & {item.nodeid, function}:
      seen |= found
      item.add_marker(pytest.mark.thorough)
  for name in sorted(names - seen):
    if whole_files and name.partition("::")[0] in files:
      raise pytest.UsageError(f"{LIST.name}: no test is called {name}.")
