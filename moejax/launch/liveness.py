"""How a process learns that another one died, and exits in order.

`meeting` leaves a star of open connections around process 0. The kernel closes a
process's connection the moment it dies, however it dies, and gives up on a vanished
machine after half a minute. So there are no heartbeats of our own, and a long compile or
a slow disk is not mistaken for a death.

    with Watch(index, links):
      train()

If a peer's connection closes without a message, that peer is lost: the others print this
and exit at once, with code 3. A peer that exits because of an error sends it first; the
others get some time to reach and report the same error themselves. At the end of the
body all wait for each other, as long as it takes. The exit is `os._exit`: the runtime's
own exit waits up to five minutes for dead processes, and its abort has no message.

After a bug in one process, all exit with code 1: srun returns the highest code of a job's
tasks, and 3 would restart a job that ends in the same way. An error of jax's runtime
counts as a loss for the others (code 3), since a network or device may have failed.
"""

import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn

from moejax.errors import EXIT_CODE, NOT_IN_AGREEMENT, PEER_LOST, UserError
from moejax.launch.link import Link, Message, field, printable

GRACE_SECONDS = 15.0
"""How long after a peer's error a process may take to reach an error of its own."""
_CONSEQUENCE_SECONDS = 3.0
"""Longest time between the failure of a collective and that of the connection."""
_LAST_SECONDS = GRACE_SECONDS + 5
"""How long process 0 may stay after its error: it exits last, since the runtime aborts
processes that outlive it."""
_BUG = 1
_INTERRUPTED = 130
_LONGEST = 20_000
"""Most characters repeated from another process's error."""

_RUNTIME_ERRORS = ("JaxRuntimeError", "XlaRuntimeError")
_SAME_CODE = (EXIT_CODE, NOT_IN_AGREEMENT)
"""Exit codes of errors that all processes share."""


class Watch:
  """While entered, ends this process when another one of the job is lost."""

  def __init__(self, index: int, links: Sequence[Link]):
    """Takes over the links of `meeting.meet`; index is that of this process."""
    self._index, self._links = index, list(links)
    self._is_host = index == 0
    self._verdict: tuple[int, str] | None = None
    """Exit code and error of the first peer that failed or was lost."""
    self._bad_news = threading.Event()
    self._ending = threading.Lock()
    self._done: set[int] = set()
    """Peers that have finished, and may close their connections."""
    self._all_done = threading.Event()

  def __enter__(self) -> "Watch":
    # A forked worker would hold our connections open after our death.
    os.register_at_fork(after_in_child=self._close)
    threading.Thread(target=self._watch, name="peers", daemon=True).start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if error is None:
      self._leave_together()
      return
    if isinstance(error, UserError):
      self._end(error.exit_code, str(error))
    if isinstance(error, KeyboardInterrupt):
      self._end(_INTERRUPTED, "interrupted")
    traceback.print_exception(kind, error, trace)
    # A collective may have failed because of a peer; if so, report that instead.
    self._bad_news.wait(_CONSEQUENCE_SECONDS)
    own = (_BUG, f"{type(error).__name__}: {error}".splitlines()[0])
    self._end(*(self._verdict or own))

  def _leave_together(self) -> None:
    """Waits until all are done; deaths are still noticed meanwhile."""
    if not self._is_host:
      self._tell({"done": self._index})
      self._all_done.wait()
      return
    self._all_done.wait()
    self._tell({"done": 0})

  def _watch(self) -> None:
    selector = selectors.DefaultSelector()
    for link in self._links:
      selector.register(link.socket, selectors.EVENT_READ, link)
      try:
        self._hear(link, link.early)
      except ValueError as error:
        selector.unregister(link.socket)
        self._gone(link, error)
    while selector.get_map():
      for key, _ in selector.select():
        link = key.data
        try:
          self._hear(link, link.receive())
        except (OSError, ValueError) as error:
          selector.unregister(link.socket)
          self._gone(link, error)

  def _hear(self, link: Link, messages: list[Message]) -> None:
    for message in messages:
      if "done" in message:
        self._done.add(link.index)
        if len(self._done) == len(self._links):
          self._all_done.set()
      elif "failed" in message:
        code, text = field(message, "code", int), field(message, "text", str)
        at_once = field(message, "at_once", bool)
        failed = _failed(code % 256 or 1, printable(text, _LONGEST), at_once=at_once)
        self._note(failed, link)
        if not at_once:
          time.sleep(GRACE_SECONDS)
        self._end(failed["code"], failed["text"])

  def _gone(self, link: Link, error: Exception) -> None:
    if link.index in self._done:
      return
    text = (
      f"{link} was lost: its connection ended without notice ({_reason(error)}). It was "
      "killed or crashed (kill -9, out of memory, a machine that went down): see its own "
      "output. Starting the job again continues from the newest checkpoint."
    )
    self._note(_failed(PEER_LOST, text, at_once=True), link)
    self._end(PEER_LOST, text)

  def _note(self, failed: Message, source: Link) -> None:
    self._verdict = (failed["code"], failed["text"])
    self._bad_news.set()
    if self._is_host:
      self._tell(failed, but=source)

  def _end(self, code: int, text: str) -> NoReturn:
    """Prints why, informs the others and ends the process; only the first call counts."""
    if not self._ending.acquire(blocking=False):
      time.sleep(2 * _LAST_SECONDS)
    print(f"error: {text}", file=sys.stderr)
    if self._verdict is None:
      self._tell(self._farewell(code, text))
    if self._is_host:
      self._outlive(_LAST_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def _farewell(self, code: int, text: str) -> Message:
    if code in _SAME_CODE:
      return _failed(code, text, at_once=False)
    is_bug = code == _BUG and not text.startswith(_RUNTIME_ERRORS)
    who = f"process {self._index} ({socket.gethostname()})"
    text = f"{who} was lost: it left with exit code {code} ({text}). See its own output."
    return _failed(_BUG if is_bug else PEER_LOST, text, at_once=False)

  def _tell(self, message: Message, but: Link | None = None) -> None:
    for link in self._links:
      if link is not but:
        link.send(message)

  def _outlive(self, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for link in self._links:
      try:
        while (left := deadline - time.monotonic()) > 0:
          link.socket.settimeout(left)
          if not link.socket.recv(1 << 16):
            break
      except OSError:
        pass  # Closed, or out of time.

  def _close(self) -> None:
    for link in self._links:
      link.close()


def _failed(code: int, text: str, *, at_once: bool) -> Message:
  return {"failed": True, "code": code, "text": text, "at_once": at_once}


def _reason(error: Exception) -> str:
  return getattr(error, "strerror", None) or str(error)
