"""Progress output of a run: a live bar, or a few plain lines.

A terminal gets a bar with step, loss, tokens/s, time left and dropped tokens. A
file or a pipe gets a bounded number of lines, so that the log of a million steps
stays readable. Slow work before the first step is named while it lasts; slow work
between steps, such as an evaluation, gets its own bar, or a line every ten seconds.
Processes other than the first are silent.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from moejax.run.results import coverage

_T = TypeVar("_T")

MAX_LINES = 25
"""Approximate maximum of progress lines per start; messages and phases come on top."""

PHASE_SECONDS = 10.0
"""Seconds between two plain lines about a phase."""


@runtime_checkable
class Reporter(Protocol):
  """Shows the progress of a run."""

  def update(self, step: int, values: dict[str, Any]) -> None:
    """Shows that `step` steps are done, with the latest known metrics."""
    ...

  def phase(self, name: str, done: int, total: int) -> None:
    """Shows the progress of work between steps; the first call has `done` = 0.

    Args:
      name: the phase and its unit, such as "validation, tokens".
      done: amount completed.
      total: amount at which the phase ends and is no longer shown.
    """
    ...

  def message(self, text: str) -> None:
    """Prints a message once, above the bar."""
    ...

  def working(self, what: str) -> contextlib.AbstractContextManager[None]:
    """Shows what the `with` body is doing, and then how long it took."""
    ...

  def close(self) -> None: ...


class _TimeLeft(ProgressColumn):
  """Time left at this process's mean speed, ignoring the first (compile) step."""

  def __init__(self, clocks: "dict[Any, _Clock]"):
    super().__init__()
    self._clocks = clocks

  def render(self, task: Task) -> Text:
    return Text(self._clocks[task.id].left(int(task.completed)))


class _Clock:
  def __init__(self, total: int):
    self._total = total
    self._begin: int | None = None
    self._first: tuple[int, float] | None = None

  def start(self, step: int) -> None:
    """Starts timing once the first step is done, since that one includes compilation."""
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


def first_call(
  function: Callable[..., _T], what: str, reporter: Reporter
) -> Callable[..., _T]:
  """Returns `function` with its first call, which compiles, reported."""
  calls = 0

  def call(*args: Any, **kwargs: Any) -> _T:
    nonlocal calls
    calls += 1
    if calls > 1:
      return function(*args, **kwargs)
    with reporter.working(what):
      return function(*args, **kwargs)

  return call


def describe(values: dict[str, Any]) -> str:
  """Returns the few numbers worth watching, on one line."""
  parts = []
  if "loss" in values:
    parts.append(f"loss {values['loss']:.3f}")
  if "validation_loss" in values:
    parts.append(f"validation {values['validation_loss']:.3f}{_covered(values)}")
  if "tokens_per_second" in values:
    parts.append(f"{_short(values['tokens_per_second'])} tokens/s")
  if "dropped_fraction" in values:
    parts.append(f"dropped {100 * values['dropped_fraction']:.1f}%")
  if values.get("skipped_steps"):
    parts.append(f"skipped {values['skipped_steps']}")
  return "  ".join(parts)


def _covered(values: dict[str, Any]) -> str:
  """Returns which tokens the validation loss covers."""
  if "validation_num_tokens" not in values:
    return ""
  split = values.get("validation_split_tokens")
  return f" ({coverage(values['validation_num_tokens'], split, _short)})"


def _short(value: float) -> str:
  for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if value >= size:
      return f"{value / size:.1f}{unit}"
  return f"{value:.0f}"


class _Numbers(ProgressColumn):
  """The latest numbers; in the steps row, any work in progress instead."""

  def __init__(self):
    super().__init__()
    self.steps: Any = None
    self.work: tuple[str, float] | None = None

  def render(self, task: Task) -> Text:
    if self.work is None or task.id != self.steps:
      return Text(task.fields["numbers"])
    what, since = self.work
    return Text(f"{what} {time.monotonic() - since:.0f} s")


class Bar:
  """A live progress bar on a terminal, shown from the first update, phase or work."""

  def __init__(self, total: int, console: Console):
    self._total = total
    self._clocks: dict[Any, _Clock] = {}
    self._numbers = _Numbers()
    self._progress = Progress(
      TextColumn("{task.description}"),
      BarColumn(bar_width=None),
      self._numbers,
      TextColumn("left"),
      _TimeLeft(self._clocks),
      console=console,
    )
    self._phase: Any = None
    self._step = 0
    self._values: dict[str, Any] = {}

  def update(self, step: int, values: dict[str, Any]) -> None:
    self._step = step
    self._values.update(values)
    self._show_steps()

  def _show_steps(self) -> None:
    if self._numbers.steps is None:
      self._numbers.steps = self._add(self._total, self._step)
    label = f"step {self._step}/{self._total}"
    self._show(self._numbers.steps, self._step, label, describe(self._values))

  def phase(self, name: str, done: int, total: int) -> None:
    if self._phase is None:
      self._phase = self._add(total, 0)
    if done < total:
      self._show(self._phase, done, name, f"{_short(done)}/{_short(total)}")
    else:
      self._progress.remove_task(self._phase)
      self._phase = None

  def _add(self, total: int, done: int) -> Any:
    self._progress.start()
    # Invisible until its clock exists.
    task = self._progress.add_task(
      "", total=total, completed=done, numbers="", visible=False
    )
    self._clocks[task] = _Clock(total)
    return task

  def _show(self, task: Any, done: int, description: str, numbers: str) -> None:
    self._clocks[task].start(done)
    self._progress.update(
      task, completed=done, description=description, numbers=numbers, visible=True
    )

  def message(self, text: str) -> None:
    self._progress.console.print(text, markup=False, highlight=False)

  @contextlib.contextmanager
  def working(self, what: str) -> Iterator[None]:
    if self._numbers.steps is None:
      self._show_steps()
    since = time.monotonic()
    self._numbers.work = (what, since)
    try:
      yield
    finally:
      self._numbers.work = None
    self.message(_took(what, since))

  def close(self) -> None:
    self._progress.stop()


class Lines:
  """Plain lines at even intervals."""

  def __init__(self, total: int, stream: Any):
    self._clock = _Clock(total)
    self._total = total
    self._stream = stream
    self._every = self._next = 0
    self._values: dict[str, Any] = {}
    self._phase: tuple[_Clock, float] | None = None

  def update(self, step: int, values: dict[str, Any]) -> None:
    if not self._every:
      self._every = max(1, -(-(self._total - step) // MAX_LINES))
      self._next = step + 1
    self._clock.start(step)
    self._values.update(values)
    # Only if there is something new to show.
    if not values or (step < self._next and step != self._total):
      return
    self._next = step - step % self._every + self._every
    left = self._clock.left(step)
    self.message(f"step {step}/{self._total}  {describe(self._values)}  left {left}")

  def phase(self, name: str, done: int, total: int) -> None:
    now = time.monotonic()
    clock, told = self._phase or (_Clock(total), now)
    clock.start(done)
    if done >= total:
      self._phase = None
      return
    if now - told >= PHASE_SECONDS:
      told = now
      self.message(f"{name}  {done:,}/{total:,}  left {clock.left(done)}")
    self._phase = (clock, told)

  def message(self, text: str) -> None:
    print(text, file=self._stream, flush=True)

  @contextlib.contextmanager
  def working(self, what: str) -> Iterator[None]:
    self.message(f"{what} ...")
    since = time.monotonic()
    yield
    self.message(_took(what, since))

  def close(self) -> None:
    pass


class Silent:
  """Shows nothing: for processes other than the first."""

  def update(self, step: int, values: dict[str, Any]) -> None:
    pass

  def phase(self, name: str, done: int, total: int) -> None:
    pass

  def message(self, text: str) -> None:
    pass

  def working(self, what: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()

  def close(self) -> None:
    pass


@contextlib.contextmanager
def watched(reporter: Reporter, name: str, total: int) -> Iterator[Callable[[int], None]]:
  """Shows a phase while the `with` body runs; yields a function that takes `done`.

  Only leaving the body ends the phase, since `total` may be an underestimate.
  """
  reporter.phase(name, 0, total)
  try:
    yield lambda done: reporter.phase(name, min(done, total - 1), total)
  finally:
    reporter.phase(name, total, total)


def _took(what: str, since: float) -> str:
  return f"{what}: {time.monotonic() - since:.1f} s"


def make_reporter(total: int, *, process_index: int = 0, stream: Any = None) -> Reporter:
  """Returns a bar for a terminal, else lines; a silent reporter on other processes."""
  if process_index:
    return Silent()
  stream = sys.stdout if stream is None else stream
  if stream.isatty():
    return Bar(total, Console(file=stream))
  return Lines(total, stream)
