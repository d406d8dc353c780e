"""Event loops in which Orbax fails quietly.

Orbax reads or writes all arrays at once in its own loop, and closes the loop as soon as
one of them fails. The other tasks are then abandoned: TensorStore's threads, Python's
garbage collector and asyncio each report every one of them, in hundreds of lines around
the one error that we report. The loops of this module first let the other tasks end, and
drop the reports of Orbax's errors.
"""

import asyncio
import pathlib
import time
import traceback
from typing import Any

_PATIENCE_SECONDS = 5.0
"""How long the other tasks may take to end; after that they are cancelled. A task
cancelled before it started would be reported as never awaited."""


_ASYNCIO = pathlib.Path(asyncio.__file__).parent


def install() -> None:
  """Makes all new event loops of this process quiet; idempotent.

  Permanent, since Orbax creates loops in background threads. A policy set by other code
  is kept.
  """
  if type(asyncio.get_event_loop_policy()) is asyncio.DefaultEventLoopPolicy:
    asyncio.set_event_loop_policy(_Policy())


class _Loop(asyncio.SelectorEventLoop):
  def __init__(self):
    super().__init__()
    self.set_exception_handler(_report)

  def close(self) -> None:
    if not (self.is_closed() or self.is_running()):
      self._end_tasks()
    super().close()

  def _end_tasks(self) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    # A task may start others.
    while (tasks := asyncio.all_tasks(self)) and time.monotonic() < deadline:
      self.run_until_complete(asyncio.wait(tasks, timeout=deadline - time.monotonic()))
    for task in tasks:
      task.cancel()
    if tasks:
      self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))


class _Policy(asyncio.DefaultEventLoopPolicy):
  def new_event_loop(self) -> asyncio.AbstractEventLoop:
    return _Loop()


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
  """Passes on the report of an abandoned task, unless it is one of Orbax's errors.

  The first of those is raised anyway, and reported by us.
  """
  error = context.get("exception")
  if error is None or not _is_orbax(error):
    loop.default_exception_handler(context)


def _is_orbax(error: BaseException) -> bool:
  """Returns whether Orbax failed, or TensorStore, whose tracebacks show only asyncio."""
  frames = traceback.extract_tb(error.__traceback__)
  files = [pathlib.Path(frame.filename) for frame in frames]
  if any("orbax" in file.parts for file in files):
    return True
  return bool(files) and all(file.parent == _ASYNCIO for file in files)
