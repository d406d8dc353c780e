"""The list of mutants stays true to the code; running them is tools.mutation_check."""

import pathlib

import pytest

from tools import mutation_check
from tools.mutants import MUTANTS

ROUTING = pathlib.Path(__file__).parents[2] / "moejax" / "routing"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_each_edit_can_be_made(mutant, tmp_path):
  """Its text stands exactly once, and what comes out is another valid program."""
  before = (ROUTING / mutant.file).read_text("utf-8")
  path = tmp_path / mutant.file
  path.write_text(before, "utf-8")
  mutation_check.edit(path, mutant)
  after = path.read_text("utf-8")
  assert after != before
  compile(after, mutant.file, "exec")
