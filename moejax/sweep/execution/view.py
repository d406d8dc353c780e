"""The progress display of a sweep: a live table on a terminal, lines elsewhere."""

import collections
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moejax.sweep.execution.states import State, Status

WIDTH = 160
"""Columns of a table that is not written to a terminal, so that names stay whole."""

_STYLES = {
  State.WAITING: "dim",
  State.QUEUED: "blue",
  State.RUNNING: "cyan",
  State.DONE: "green",
  State.FAILED: "bold red",
  State.INTERRUPTED: "yellow",
  State.DAMAGED: "bold red",
}
_FRAME = 6
"""Lines of a terminal that the table's frame and the summary take."""

_ON_TOP = "starts, compilation and evaluation on top"

_REASON = 32
"""Most characters shown of the reason why a job waits."""

_WHOLE_TAILS = 3
"""Number of failed runs for which more than the log's last line is shown."""

_WATCHED = (State.RUNNING, State.FAILED, State.INTERRUPTED, State.DAMAGED)


@runtime_checkable
class View(Protocol):
  """Shows the states of a sweep's runs while they change."""

  def update(self, statuses: Mapping[str, Status], num_jobs: int) -> None:
    """Takes the newest status of every run, by name, in the order of the points."""
    ...

  def message(self, text: str) -> None:
    """Prints a line once."""
    ...

  def close(self) -> None: ...


def table(statuses: Sequence[Status]) -> Table:
  """Returns one row per run."""
  out = Table("run", "state", box=None, pad_edge=False, header_style="bold")
  for name in ("step", "loss", "validation", "dropped", "left"):
    out.add_column(name, justify="right", no_wrap=True)
  out.columns[0].overflow = "fold"
  for s in statuses:
    out.add_row(
      Text(s.name),
      Text(state(s), style=_STYLES[s.state]),
      f"{s.step}/{s.num_steps}" if s.num_steps else "",
      _number(s.loss),
      _number(s.validation_loss),
      "" if s.dropped is None else f"{100 * s.dropped:.1f}%",
      duration(s.seconds_left) if s.state is State.RUNNING else "",
    )
  return out


def state(status: Status) -> str:
  """Returns a run's state in words: `failed (exit code 1)`."""
  if status.state is State.FAILED and status.exit_code is not None:
    return f"{status.state} (exit code {status.exit_code})"
  if status.state is State.RUNNING and not status.step:
    # Nothing was logged yet, which takes a minute or more on a busy machine.
    return f"{status.state} (starting, compiling)"
  if status.state is State.QUEUED:
    # Some of Slurm's reasons are whole sentences.
    reason = textwrap.shorten(status.reason, _REASON, placeholder=" ...")
    return f"{status.state} ({', '.join(filter(None, (status.job, reason)))})"
  return str(status.state)


def _number(value: float | None) -> str:
  return "" if value is None else f"{value:.4f}"


def summary(statuses: Sequence[Status], num_jobs: int) -> str:
  """Returns the number of runs in each state, and the time left of the sweep."""
  counts = collections.Counter(s.state for s in statuses)
  text = ", ".join(f"{counts[state]} {state}" for state in State if counts[state])
  left = time_left(statuses, num_jobs)
  # Starts may take minutes when steps take seconds, so a bare time would seem to be the
  # time until the end.
  more = f"; about {duration(left)} of training steps left, {_ON_TOP}" if left else ""
  return f"{len(statuses)} runs: {text or 'none'}{more}"


def time_left(statuses: Sequence[Status], num_jobs: int) -> float | None:
  """Returns the seconds that the steps of all unfinished runs take; None if unknown.

  A run without a known speed is assumed to run at the mean FLOP/s of the others. Starts,
  compilation, evaluation and failed runs are not included.

  Args:
    statuses: of all runs.
    num_jobs: runs at once.
  """
  rates = [s.flops_per_second for s in statuses if s.flops_per_second]
  rate = sum(rates) / len(rates) if rates else None
  seconds = []
  for s in statuses:
    if s.state in (State.DONE, State.FAILED, State.DAMAGED):
      continue
    if s.seconds_left is not None:
      seconds.append(s.seconds_left)
    elif rate is not None and s.flops_left:
      seconds.append(s.flops_left / rate)
    else:
      return None
  # No run takes less than its own time, however many run at once.
  return max(sum(seconds) / num_jobs, max(seconds)) if seconds else 0.0


def duration(seconds: float | None) -> str:
  """Returns a time in its two largest units; a dash if unknown."""
  if seconds is None:
    return "-"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f"{days} d {hours} h"
  if hours:
    return f"{hours} h {minutes} min"
  return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def one_line(status: Status) -> str:
  """Returns a line with a run's name, state and numbers."""
  parts = [f"{status.name}: {state(status)}"]
  if status.state not in (State.WAITING, State.QUEUED) and status.num_steps:
    parts.append(f"step {status.step}/{status.num_steps}")
  if status.loss is not None:
    parts.append(f"loss {status.loss:.4f}")
  if status.state is State.DONE and status.validation_loss is not None:
    parts.append(f"validation {status.validation_loss:.4f}")
  if status.dropped is not None:
    parts.append(f"dropped {100 * status.dropped:.1f}%")
  return "  ".join(parts)


class Lines:
  """A line per change of state."""

  def __init__(self, stream: Any):
    self._stream = stream
    self._states: dict[str, State] = {}

  def update(self, statuses: Mapping[str, Status], num_jobs: int) -> None:
    known = bool(self._states)
    changed = [s for s in statuses.values() if self._states.get(s.name) != s.state]
    if not changed:
      return
    for s in changed:
      self._states[s.name] = s.state
      if known or s.state is not State.WAITING:
        self.message(one_line(s))
    self.message(summary(list(statuses.values()), num_jobs))

  def message(self, text: str) -> None:
    print(text, file=self._stream, flush=True)

  def close(self) -> None:
    pass


class Rich:
  """A live table, cut to the runs worth watching if the terminal is too short."""

  def __init__(self, console: Console):
    self._console = console
    # Redrawn only by `update`: it has no thread that a fork could copy.
    self._live = Live(console=console, auto_refresh=False, transient=True)
    self._live.start()
    self._last: tuple[Mapping[str, Status], int] = ({}, 1)
    self._drawn = 0.0

  def update(self, statuses: Mapping[str, Status], num_jobs: int) -> None:
    states = [s.state for s in statuses.values()]
    same = states == [s.state for s in self._last[0].values()]
    self._last = (dict(statuses), num_jobs)
    if same and time.monotonic() < self._drawn + 0.5:
      return
    self._drawn = time.monotonic()
    shown = list(statuses.values())
    room = max(self._console.size.height - _FRAME, 3)
    if len(shown) > room:
      shown = [s for s in shown if s.state in _WATCHED][:room]
    text = Text(summary(list(statuses.values()), num_jobs))
    self._live.update(Group(table(shown), text), refresh=True)

  def message(self, text: str) -> None:
    self._console.print(text, markup=False, highlight=False)

  def close(self) -> None:
    """Leaves the whole table on the screen."""
    self._live.stop()
    statuses, num_jobs = self._last
    if statuses:
      self._console.print(table(list(statuses.values())))
      self.message(summary(list(statuses.values()), num_jobs))


def make_view(stream: Any = None) -> View:
  """Returns a live table for a terminal, else lines; None is standard output."""
  stream = sys.stdout if stream is None else stream
  return Rich(Console(file=stream)) if stream.isatty() else Lines(stream)


def print_table(
  statuses: Sequence[Status], num_jobs: int = 1, stream: Any = None
) -> None:
  """Prints the table once, with the last lines of failed runs' logs."""
  stream = sys.stdout if stream is None else stream
  console = Console(file=stream, width=None if stream.isatty() else WIDTH)
  console.print(table(statuses))
  console.print(summary(statuses, num_jobs), markup=False, highlight=False)
  for text in [*failures(statuses), *remarks(statuses)]:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def failures(statuses: Sequence[Status]) -> list[str]:
  """Returns each failed run's name, exit code, log and the last lines of the log.

  After the first few, one line each: fifty runs rarely fail for fifty reasons.
  """
  failed = [s for s in statuses if s.state is State.FAILED]
  return [
    _failure(s, s.tail if i < _WHOLE_TAILS else s.tail[-1:]) for i, s in enumerate(failed)
  ]


def _failure(status: Status, tail: Sequence[str]) -> str:
  code = status.exit_code
  how = f"exit code {code}" if code != 0 else "without its last checkpoint"
  head = f"{status.name} failed ({how}). The end of {status.path / 'train.log'}:"
  if len(tail) == 1:
    return f"{head} {tail[0].strip()}"
  return "\n".join([head, *(f"  {line}" for line in tail)])


def remarks(statuses: Sequence[Status]) -> list[str]:
  """Returns a line for each file of a run that is damaged, cut or another run's."""
  return [text for s in statuses for text in (s.damage, s.note) if text]
