"""What `make test` leaves out is named, and a name that fits no test is an error."""

import types
from typing import Any

import pytest

from tests import thorough


class Item(types.SimpleNamespace):
  """A collected test, as far as it is read here."""

  def add_marker(self, marker):
    self.marker = marker.name


def items(*names) -> Any:
  return [Item(nodeid=name, marker=None) for name in names]


@pytest.fixture(autouse=True)
def _list(tmp_path, monkeypatch):
  file = tmp_path / "thorough.txt"
  file.write_text("# Comment.\na.py::test_all\na.py::test_some[x::y [0]]\n")
  monkeypatch.setattr(thorough, "LIST", file)


def test_a_function_stands_for_its_parameters_and_an_id_for_itself():
  found = items(
    *("a.py::test_all[1]", "a.py::test_all", "a.py::test_some[x::y [0]]"),
    *("a.py::test_some[y]", "a.py::test_all_else", "b.py::test_all"),
  )
  thorough.mark(found, whole_files=True)
  assert [item.marker for item in found] == ["thorough"] * 3 + [None] * 3


def test_a_line_without_a_test_is_an_error_where_its_file_is_collected():
  """Not where a single test was asked for, nor in a run of other files."""
  found = items("a.py::test_all")
  with pytest.raises(pytest.UsageError, match=r"called a\.py::test_some\[x"):
    thorough.mark(found, whole_files=True)
  thorough.mark(found, whole_files=False)
  thorough.mark(items("b.py::test_all"), whole_files=True)


def test_the_list_is_in_order_and_names_files_that_exist(monkeypatch):
  monkeypatch.undo()
  lines = [x for x in thorough.LIST.read_text().splitlines() if not x.startswith("#")]
  assert lines == sorted(set(lines)) and len(lines) > 100
  root = thorough.LIST.parents[1]
  assert all((root / line.partition("::")[0]).is_file() for line in lines)
