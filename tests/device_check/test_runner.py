"""One bad check is one bad row, whatever it does to its process."""

from moejax.device_check.runner import run_all
from tests.device_check import fake_checks


def rows_of(*names: str, make=fake_checks.make_checks, seconds=100.0, longest=30.0):
  shown = []
  rows = run_all(make, names, seconds=seconds, longest=longest, show=shown.append)
  assert shown == rows
  return rows


def test_what_raises_or_kills_its_process_does_not_stop_the_rest():
  """A row each, in order; the process goes on after a wrong number, and is replaced after
  an exception, which may have left the device unusable, and after its death."""
  names = ("fine", "wrong", "fine", "raising", "fine", "dying", "fine", "not here")
  rows = rows_of(*names)
  assert [row.name for row in rows] == list(names)
  status = ["ok", "failed", "ok", "failed", "ok", "failed", "ok", "not run"]
  assert [row.status for row in rows] == status
  assert rows[1].numbers == {"error": 1.0}
  assert rows[3].detail == "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS"
  assert rows[5].detail == "the process died (exit code -6)"
  assert rows[7].detail == "not here"
  first, same, second, third = (row.detail for row in rows[::2])
  assert first == same and len({first, second, third}) == 3


def test_what_hangs_is_ended_and_named():
  """After the longest that a check may take; the next one runs."""
  hung, after = rows_of("hanging", "fine", longest=1.0)
  assert (hung.status, hung.detail) == ("failed", "no answer after 1 s")
  assert after.status == "ok"


def test_what_the_time_does_not_hold_is_named_as_not_run():
  """The check that time ran out on is ended and no failure; nor are those behind it."""
  cut, behind = rows_of("hanging", "fine", seconds=8.0)
  assert cut.status == behind.status == "not run"
  assert "cut off" in cut.detail and "minutes were used up" in behind.detail


def test_devices_that_cannot_be_listed_are_a_failure():
  """Not an empty table that passes."""
  [row] = rows_of("fine", make=fake_checks.refuse)
  assert (row.status, row.detail) == ("failed", "RuntimeError: no device for 1 checks")


def test_an_interruption_leaves_a_whole_table():
  """Ctrl-C after the second row: what was found so far, and the rest by name."""
  shown = []

  def show(row):
    shown.append(row)
    if len(shown) == 2:
      raise KeyboardInterrupt

  names = ("fine", "wrong", "fine", "fine")
  rows = run_all(fake_checks.make_checks, names, seconds=100, longest=30, show=show)
  assert [row.status for row in rows] == ["ok", "failed", "not run", "not run"]
  assert {row.detail for row in rows[2:]} == {"interrupted"}
