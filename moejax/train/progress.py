"""What a person watching a run sees: a live bar, or a few plain lines.

A terminal gets a bar with step, loss, tokens/s, time left and dropped tokens. A
file or a pipe gets a bounded number of lines, so that the log of a million steps
can still be read. Processes other than the first are silent.
"""

import sys
import time
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

MAX_LINES = 25
"""Plain progress lines of a whole run, messages not counted."""


@runtime_checkable
class Reporter(Protocol):
  """Shows how far a run is."""

  def update(self, step: int, values: dict[str, Any]) -> None:
    """Shows that `step` steps are done, with the latest metrics known."""
    ...

  def message(self, text: str) -> None:
    """Says something once, above the bar."""
    ...

  def close(self) -> None: ...


class _TimeLeft(ProgressColumn):
  """Time left from the mean speed of this process, ignoring the first (compile) step."""

  def __init__(self, clock: "_Clock"):
    super().__init__()
    self._clock = clock

  def render(self, task: Task) -> Text:
    return Text(self._clock.left(int(task.completed)))


class _Clock:
  def __init__(self, total: int):
    self._total = total
    self._begin: int | None = None
    self._first: tuple[int, float] | None = None

  def start(self, step: int) -> None:
    """Starts with the first step that is done, since that one waited for compiling."""
    if self._begin is None:
      self._begin = step
    elif self._first is None and step > self._begin:
      self._first = (step, time.monotonic())

  def left(self, step: int) -> str:
    if self._first is None or step <= self._first[0]:
      return "--:--"
    first, since = self._first
    seconds = (time.monotonic() - since) / (step - first) * (self._total - step)
    hours, rest = divmod(int(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def describe(values: dict[str, Any]) -> str:
  """The few numbers worth watching, on one line."""
  parts = []
  if "loss" in values:
    parts.append(f"loss {values['loss']:.3f}")
  if "validation_loss" in values:
    parts.append(f"validation {values['validation_loss']:.3f}")
  if "tokens_per_second" in values:
    parts.append(f"{_short(values['tokens_per_second'])} tokens/s")
  if "dropped_fraction" in values:
    parts.append(f"dropped {100 * values['dropped_fraction']:.1f}%")
  if values.get("skipped_steps"):
    parts.append(f"skipped {values['skipped_steps']}")
  return "  ".join(parts)


def _short(value: float) -> str:
  for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if value >= size:
      return f"{value / size:.1f}{unit}"
  return f"{value:.0f}"


class Bar:
  """A live progress bar on a terminal."""

  def __init__(self, total: int, start: int, console: Console):
    self._clock = _Clock(total)
    self._progress = Progress(
      TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
      BarColumn(bar_width=None),
      TextColumn("{task.fields[numbers]}"),
      TextColumn("left"),
      _TimeLeft(self._clock),
      console=console,
    )
    self._task = self._progress.add_task("", total=total, completed=start, numbers="")
    self._values: dict[str, Any] = {}
    self._progress.start()

  def update(self, step: int, values: dict[str, Any]) -> None:
    self._clock.start(step)
    self._values.update(values)
    numbers = describe(self._values) or "compiling"
    self._progress.update(self._task, completed=step, numbers=numbers)

  def message(self, text: str) -> None:
    self._progress.console.print(text, markup=False, highlight=False)

  def close(self) -> None:
    self._progress.stop()


class Lines:
  """Plain lines at even distances."""

  def __init__(self, total: int, start: int, stream: Any):
    self._clock = _Clock(total)
    self._total = total
    self._stream = stream
    self._every = max(1, -(-(total - start) // MAX_LINES))
    self._next = start + 1
    self._values: dict[str, Any] = {}

  def update(self, step: int, values: dict[str, Any]) -> None:
    self._clock.start(step)
    self._values.update(values)
    # Only where there is something new to show.
    if not values or (step < self._next and step != self._total):
      return
    self._next = step - step % self._every + self._every
    left = self._clock.left(step)
    self.message(f"step {step}/{self._total}  {describe(self._values)}  left {left}")

  def message(self, text: str) -> None:
    print(text, file=self._stream, flush=True)

  def close(self) -> None:
    pass


class Silent:
  """For processes other than the first."""

  def update(self, step: int, values: dict[str, Any]) -> None:
    pass

  def message(self, text: str) -> None:
    pass

  def close(self) -> None:
    pass


def make_reporter(
  total: int, start: int, *, process_index: int = 0, stream: Any = None
) -> Reporter:
  """A bar on a terminal, lines elsewhere, nothing on other processes."""
  if process_index:
    return Silent()
  stream = sys.stdout if stream is None else stream
  if stream.isatty():
    return Bar(total, start, Console(file=stream))
  return Lines(total, start, stream)
