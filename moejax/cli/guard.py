"""How a program ends: one line for a user error, 130 for Ctrl-C."""

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from moejax.errors import EXIT_CODE, UserError
from moejax.storage.full import is_full

_INTERRUPTED = 130
_BROKEN_PIPE = 141
_T = TypeVar("_T")

_pressed: list[int] = []
"""One entry per Ctrl-C so far."""


def guarded(function: Callable[[], _T]) -> _T:
  """Calls `function`; if it raises an error, exits with the error's code."""
  _listen()
  try:
    return function()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
  except BrokenPipeError:
    # The reader of the output, such as head, has closed it: flush to /dev/null.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(_BROKEN_PIPE)
  except (KeyboardInterrupt, Exception) as error:
    # A library interrupted during import may turn Ctrl-C into another exception.
    if not (_pressed or isinstance(error, KeyboardInterrupt)):
      if not is_full(error):
        raise
      said = " ".join(str(error).split())
      print(
        f"error: The disk is full ({said}). Make room, and give the same command again.",
        file=sys.stderr,
      )
      sys.exit(EXIT_CODE)
    print("interrupted", file=sys.stderr)
    sys.exit(_INTERRUPTED)


def _listen() -> None:
  """Records each Ctrl-C, and repeats one that was lost in a library's callback."""
  if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    return  # Ignored (a background job), or another handler is installed.

  def interrupt(number: int, frame: Any) -> None:
    _pressed.append(number)
    signal.default_int_handler(number, frame)

  def lost(unraisable: Any) -> None:
    if unraisable.exc_type is KeyboardInterrupt:
      threading.Timer(0.1, _thread.interrupt_main).start()
    else:
      sys.__unraisablehook__(unraisable)

  signal.signal(signal.SIGINT, interrupt)
  sys.unraisablehook = lost
