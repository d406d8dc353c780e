"""Runs checks of a device one by one, in a process that a check may kill.

A kernel that is wrong for a chip does not always raise: it may abort the process, hang,
or leave the device unusable. So checks run in a worker, which is replaced after each
check that did not end well, and the others go on. Nothing here imports jax: the process
that waits must not hold the device.
"""

import dataclasses
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Literal

OK, FAILED, NOT_RUN = "ok", "failed", "not run"
INTERRUPTED = "interrupted"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The result of a successful check."""

  detail: str
  numbers: dict[str, float] = dataclasses.field(default_factory=dict)


class Mismatch(Exception):
  """The device computed a wrong result."""

  def __init__(self, detail: str, **numbers: float):
    super().__init__(detail)
    self.detail, self.numbers = detail, numbers


@dataclasses.dataclass(frozen=True)
class Check:
  """One check."""

  group: str
  name: str
  run: Callable[[], Outcome]
  reason: str = ""
  """Why it cannot run here; empty if it can."""
  basic: bool = True
  """Whether a quick run includes it."""


@dataclasses.dataclass(frozen=True)
class Row:
  """The outcome of a check."""

  group: str
  name: str
  status: Literal["ok", "failed", "not run"]
  detail: str
  numbers: dict[str, float] = dataclasses.field(default_factory=dict)
  seconds: float = 0.0
  fatal: bool = False
  """Whether the process that ran it should run no other."""


MakeChecks = Callable[[Any], Sequence[Check]]
"""Returns the checks for the given options, on the available devices. Called in the
worker; the list must be the same each time."""


def run_check(check: Check) -> Row:
  """Runs a check in this process; an exception becomes a row."""
  begin = time.perf_counter()

  def row(status: Any, detail: str, numbers: Any, fatal: bool = False) -> Row:
    seconds = time.perf_counter() - begin
    return Row(check.group, check.name, status, detail, numbers, seconds, fatal)

  if check.reason:
    return row(NOT_RUN, check.reason, {})
  try:
    outcome = check.run()
  except Mismatch as error:
    return row(FAILED, error.detail, error.numbers)
  except Exception as error:
    # A kernel's error may have left the device unusable.
    return row(FAILED, first_line(error), {}, fatal=True)
  return row(OK, outcome.detail, outcome.numbers)


def first_line(error: BaseException) -> str:
  """Returns the exception's name and the first line of its message."""
  text = str(error).strip().splitlines()
  return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _serve(pipe: Connection, make_checks: MakeChecks, options: Any) -> None:
  """Runs the worker: sends the list of checks, then a row for each index it gets."""
  # Ctrl-C reaches both processes; the waiting one decides what to do.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    checks = make_checks(options)
  except Exception as error:
    pipe.send(first_line(error))
    return
  pipe.send([(check.group, check.name) for check in checks])
  while (index := pipe.recv()) is not None:
    pipe.send(run_check(checks[index]))


class _Worker:
  """A process that runs checks, until one kills it."""

  def __init__(self, make_checks: MakeChecks, options: Any, timeout: float):
    # A fresh process: a forked one would inherit threads and open devices.
    context = multiprocessing.get_context("spawn")
    self.pipe, theirs = context.Pipe()
    self.process = context.Process(
      target=_serve, args=(theirs, make_checks, options), daemon=True
    )
    self.process.start()
    theirs.close()
    started = self._receive(timeout)
    self.names: list[tuple[str, str]] = started if isinstance(started, list) else []
    self.error = "" if isinstance(started, list) else str(started)

  def run(self, index: int, timeout: float) -> Row:
    """Returns the check's row; a fatal one if the worker died or took too long."""
    begin = time.perf_counter()
    try:
      self.pipe.send(index)
      answer = self._receive(timeout)
    except OSError:
      answer = "the process died before it"
    if isinstance(answer, Row):
      return answer
    seconds = time.perf_counter() - begin
    return Row(*self.names[index], FAILED, answer, {}, seconds, fatal=True)

  def _receive(self, timeout: float) -> Any:
    """Returns what the worker sends, or a sentence on why nothing arrives."""
    if not self.pipe.poll(max(timeout, 0)):
      return f"no answer after {timeout:.0f} s"
    try:
      return self.pipe.recv()
    except (EOFError, OSError):
      self.process.join(10)
      return f"the process died (exit code {self.process.exitcode})"

  def end(self) -> None:
    self.process.terminate()
    self.process.join(5)
    if self.process.is_alive():
      self.process.kill()
      self.process.join()
    self.pipe.close()


def run_all(
  make_checks: MakeChecks,
  options: Any,
  *,
  seconds: float,
  longest: float,
  show: Callable[[Row], None],
) -> list[Row]:
  """Returns the rows of all checks, in order.

  Args:
    make_checks: importable by name, since the worker imports it.
    options: its argument.
    seconds: limit for all checks. After it, no check is begun, and the running one is
      ended.
    longest: most seconds that one check may take.
    show: called with each row.
  """
  deadline = time.monotonic() + seconds
  rows: list[Row] = []

  def left() -> float:
    return deadline - time.monotonic()

  def add(row: Row) -> None:
    rows.append(row)
    show(row)

  worker = _Worker(make_checks, options, left())
  names = worker.names
  try:
    if worker.error:
      add(Row("devices", "start", FAILED, worker.error, {}))
    for index, name in enumerate(names):
      if left() <= 0:
        add(Row(*name, NOT_RUN, f"the {seconds / 60:.3g} minutes were used up"))
        continue
      if worker.error:
        add(Row(*name, NOT_RUN, f"the devices did not recover: {worker.error}"))
        continue
      limit = min(longest, left())
      row = worker.run(index, limit)
      if row.fatal:
        worker.end()
        if limit < longest and left() <= 0:
          row = dataclasses.replace(
            row, status=NOT_RUN, detail="cut off: time was used up"
          )
        elif index + 1 < len(names):
          worker = _Worker(make_checks, options, left())
      add(row)
  except KeyboardInterrupt:
    for name in names[len(rows) :]:
      add(Row(*name, NOT_RUN, INTERRUPTED))
  finally:
    worker.end()
  return rows
