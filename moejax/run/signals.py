"""Clean stops: SIGTERM or Ctrl-C requests one, a further Ctrl-C aborts."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Protocol, runtime_checkable

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@runtime_checkable
class Notice(Protocol):
  """Notice to all processes of a job that one got a SIGTERM; see `launch.preemption`."""

  def reached(self) -> bool:
    """Returns whether all of them are to stop at this step."""
    ...


class StopRequest:
  """A context that turns the signals into a flag that the loop checks each step.

  Leaving it restores the handlers. Outside the main thread, where signals cannot be
  handled, the flag stays unset.
  """

  def __init__(self, when: str = "after this step", notice: Notice | None = None) -> None:
    """Args:
    when: when the run stops, for the message.
    notice: listens for SIGTERM instead of this context.
    """
    self._when = when
    self.notice = notice
    self.signal: int | None = None
    self._before: dict[int, Any] = {}

  @property
  def exit_code(self) -> int:
    """Exit code of the process: 128 + signal if asked to stop, else 0."""
    return 0 if self.signal is None else 128 + self.signal

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      for number in SIGNALS:
        if number == signal.SIGTERM and self.notice is not None:
          # Restoring it removes the service's handler, which Python cannot see.
          self._before[number] = signal.getsignal(number)
        else:
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
    # No print here, since a handler may interrupt one.
    name = signal.Signals(number).name
    text = f"\n{name}: saving {self._when}, then exiting. Ctrl-C aborts.\n"
    os.write(2, text.encode())
