"""Reports where a run hangs: the stack of every thread of every process.

A collective waits forever for a missing process, which looks like slow work. So the
loops of training and evaluation call `progress()`. After a set time without a call, each
process writes the stacks of its threads to its standard error. The run goes on waiting,
since a compile or a slow disk may look the same; killing any one process makes the
others exit (see `liveness`).
"""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Iterator

DEFAULT_SECONDS = 600.0
"""For several processes; a single process is watched only on request."""

_now: "_Hang | None" = None


def progress() -> None:
  """Records that a step or an evaluation batch has finished; free if nothing watches."""
  if _now is not None:
    _now.progress()


@contextlib.contextmanager
def reported(seconds: float, name: str = "This process") -> Iterator[None]:
  """While its body runs, prints stacks after `seconds` without progress or on SIGUSR1.

  Args:
    seconds: 0 disables both.
    name: of this process, for the report.
  """
  global _now
  if not seconds:
    yield
    return
  _now = _Hang(seconds, name)
  if hasattr(signal, "SIGUSR1"):
    # In C, independent of the interpreter, since a hang may be anywhere.
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
      "It keeps waiting. Its threads:"
    )
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

  def _say(self, text: str) -> None:
    print(f"\nhang: {self._name} {text}", file=sys.stderr, flush=True)
