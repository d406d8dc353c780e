"""Leaving cleanly: SIGTERM and the first Ctrl-C ask, the second Ctrl-C insists."""

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
  """While entered, turns the signals into a flag that the loop looks at each step.

  The handlers are put back on leaving. Where signals cannot be handled (outside
  the main thread) the flag just stays unset.
  """

  def __init__(self, when: str = "after this step") -> None:
    """Args:
    when: the run leaves, for the message.
    """
    self._when = when
    self.signal: int | None = None
    self._before: dict[int, Any] = {}

  @property
  def exit_code(self) -> int:
    """What a process that was asked to stop returns: 128 + signal, 0 if it was not."""
    return 0 if self.signal is None else 128 + self.signal

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      for number in SIGNALS:
        self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before.clear()

  def _handle(self, number: int, frame: FrameType | None) -> None:
    if self.signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = number
    # A handler may interrupt a print, so no print here.
    name = signal.Signals(number).name
    text = f"\n{name}: saving {self._when}, then leaving. Ctrl-C aborts.\n"
    os.write(2, text.encode())
