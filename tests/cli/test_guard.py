"""How a program ends on an error that is not its own."""

import pytest

from moejax.cli import guard
from moejax.errors import UserError


def end(error: Exception, capsys) -> tuple[object, str]:
  def fail():
    raise error

  with pytest.raises(SystemExit) as ended:
    guard.guarded(fail)
  return ended.value.code, capsys.readouterr().err


def test_a_full_disk_is_one_line_wherever_it_is_met(capsys):
  """Also where a library hid the system's error."""
  with (
    pytest.raises(OSError) as full,
    open("/dev/full", "wb", buffering=0) as file,
  ):
    file.write(b"x")
  hidden = ValueError("write failed")
  hidden.__cause__ = full.value
  for error in (full.value, hidden):
    code, said = end(error, capsys)
    assert code == 2
    assert said.startswith("error: The disk is full (") and said.count("\n") == 1


def test_a_user_s_mistake_is_one_line_and_a_bug_keeps_its_traceback(capsys):
  assert end(UserError("no such thing"), capsys) == (2, "error: no such thing\n")
  with pytest.raises(ZeroDivisionError):
    guard.guarded(lambda: 1 / 0)
