"""What is shown of a sweep: time left, the rows worth watching, a line per change."""

import io
import pathlib

import pytest
from rich.console import Console

from moejax.sweep.execution import view
from moejax.sweep.execution.states import State, Status


def status(name: str, state: State, **fields) -> Status:
  return Status(name=name, path=pathlib.Path(name), state=state, num_steps=10, **fields)


def test_the_time_left_is_that_of_the_steps_of_all_unfinished_runs():
  """30 s of its own, 200 FLOPs at the mean of 10 FLOP/s; done and failed runs none."""
  runs = [
    status("a", State.RUNNING, seconds_left=30.0, flops_per_second=10.0),
    status("b", State.WAITING, flops_left=200.0),
    status("c", State.DONE),
    status("d", State.FAILED, flops_left=500.0),
  ]
  assert view.time_left(runs, 1) == pytest.approx(50.0)
  # Two at once: 25 s each would do, but the first alone takes 30.
  assert view.time_left(runs, 2) == pytest.approx(30.0)
  assert view.time_left([status("b", State.WAITING, flops_left=1.0)], 1) is None
  assert view.time_left([status("c", State.DONE)], 1) == 0.0
  # A bare "30 s left" would be read as the end of the sweep.
  assert view.summary(runs, 2).endswith(
    "; about 30 s of training steps left, starts, compilation and evaluation on top"
  )


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(None, "-"), (59.4, "59 s"), (60.0, "1 min 0 s"), (7261.0, "2 h 1 min")],
)
def test_durations_have_two_units(seconds, text):
  assert view.duration(seconds) == text
  assert view.duration(90_000.0) == "1 d 1 h"


def test_lines_are_printed_for_changes_of_state_only():
  said = io.StringIO()
  shown = view.make_view(said)
  runs = {"a": status("a", State.WAITING), "b": status("b", State.WAITING)}
  shown.update(runs, 1)
  runs["a"] = status("a", State.RUNNING, step=1)
  for step in (1, 2, 3):
    runs["a"] = status("a", State.RUNNING, step=step)
    shown.update(runs, 1)
  runs["a"] = status("a", State.DONE, step=10, validation_loss=2.5)
  shown.update(runs, 1)
  lines = said.getvalue().splitlines()
  assert [line for line in lines if line.startswith("a:")] == [
    "a: running  step 1/10",
    "a: done  step 10/10  validation 2.5000",
  ]
  assert len(lines) == 5


def test_a_low_terminal_shows_the_runs_worth_watching_and_the_whole_table_at_the_end():
  """Twenty runs on twelve lines: those that run or failed; all when it closes."""
  said = io.StringIO()
  console = Console(file=said, force_terminal=True, width=100, height=12)
  shown = view.Rich(console)
  runs = {f"run{i}": status(f"run{i}", State.WAITING) for i in range(20)}
  runs["run7"] = status("run7", State.RUNNING, step=3, loss=2.125)
  runs["run9"] = status("run9", State.FAILED, exit_code=1)
  shown.update(runs, 2)
  live = said.getvalue()
  assert "run7" in live and "3/10" in live and "2.1250" in live
  assert "failed (exit code 1)" in live and "run1 " not in live
  assert "20 runs: 18 waiting, 1 running, 1 failed" in live
  shown.close()
  assert all(f"{name} " in said.getvalue() for name in runs)


def test_names_of_runs_are_not_read_as_markup():
  """A name in square brackets is printed as it is."""
  said = io.StringIO()
  view.print_table([status("[red]=1", State.WAITING)], stream=said)
  assert "[red]=1" in said.getvalue()


def test_a_run_without_a_logged_step_says_why():
  """A minute at step 0 looks like a hang."""
  assert view.state(status("a", State.RUNNING)) == "running (starting, compiling)"
  assert view.state(status("a", State.RUNNING, step=1)) == "running"


def test_many_failures_do_not_fill_the_screen():
  """The first three with the end of their logs, the others with its last line."""
  runs = [status(f"r{i}", State.FAILED, exit_code=1, tail=("a", "b")) for i in range(5)]
  said = view.failures(runs)
  assert [len(text.splitlines()) for text in said] == [3, 3, 3, 1, 1]
  assert said[4].endswith("train.log: b")
