"""A run that hangs says where: the stack of every thread, from every process.

A collective waits for ever for a process that does not come, and looks like slow
work. So whoever works tells `progress()`, and when nobody did for a set time each
process writes to its own standard error what all its threads are doing. The run goes
on waiting, since a compile or a slow disk may look the same; killing any one process
makes the others leave (see `liveness`).
"""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Iterator

DEFAULT_SECONDS = 600.0
"""For several processes; a single one is watched only if asked."""

_now: "_Hang | None" = None


def progress() -> None:
  """A step, or a batch of an evaluation, is finished. Costs nothing if unwatched."""
  if _now is not None:
    _now.progress()


@contextlib.contextmanager
def reported(seconds: float, name: str = "This process") -> Iterator[None]:
  """In its body, reports `seconds` without progress, and any SIGUSR1, by stacks.

  Args:
    seconds: 0 leaves everything as it is.
    name: of this process, for the report.
  """
  global _now
  if not seconds:
    yield
    return
  _now = _Hang(seconds, name)
  if hasattr(signal, "SIGUSR1"):
    # By C code, which needs no bytecode to run: a hang may be anywhere.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
  try:
    yield
  finally:
    _now.stop()
    _now = None
    if hasattr(signal, "SIGUSR1"):
      faulthandler.unregister(signal.SIGUSR1)


class _Hang:
  def __init__(self, seconds: float, name: str):
    self._seconds, self._name = seconds, name
    self._last = time.monotonic()
    self._reported = False
    self._stopped = threading.Event()
    threading.Thread(target=self._watch, name="hang", daemon=True).start()

  def progress(self) -> None:
    now = time.monotonic()
    if self._reported:
      self._reported = False
      self._say(f"goes on, {now - self._last:.0f} s after its last step.")
    self._last = now

  def stop(self) -> None:
    self._stopped.set()

  def _watch(self) -> None:
    while True:
      waited = time.monotonic() - self._last
      if waited >= self._seconds and not self._reported:
        self._reported = True
        self._report(waited)
      left = self._seconds - waited
      if self._stopped.wait(left if left > 0 else self._seconds):
        return

  def _report(self, waited: float) -> None:
    self._say(
      f"has not finished a step for {waited:.0f} s (--hang_timeout={self._seconds:g}). "
      "It goes on waiting. What its threads do:"
    )
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

  def _say(self, text: str) -> None:
    print(f"\nhang: {self._name} {text}", file=sys.stderr, flush=True)
