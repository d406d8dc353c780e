"""A connection to another process of the job, over which JSON lines go.

Whoever reaches the port can write to it. So nothing that comes is believed before it
is looked at: a message has a greatest size and depth, names and types are checked by
`field`, and where the job has a secret each line carries a code that only who knows the
secret can make, over the line, its direction and its number.
"""

import hmac
import json
import socket
import threading
from typing import Any, TypeVar

from moejax import files
from moejax.launch import secret

Message = dict[str, Any]

SILENCE = {
  "TCP_KEEPIDLE": 10,
  "TCP_KEEPINTVL": 5,
  "TCP_KEEPCNT": 4,
  "TCP_USER_TIMEOUT": 30_000,
}
"""Seconds, seconds, times, and milliseconds where something is under way: a machine
that vanished is noticed after 30 s. The kernels ask and answer, so a process that
compiles for minutes, or is stopped, is not taken for a dead one."""

HELLO_BYTES = 1024
"""Of a message from who has not said yes to anything."""
MESSAGE_BYTES = 1 << 18
"""Of any later message: ten times what a process has to say of itself."""
_DEPTH = 8
_CODE = 64
"""Hexadecimal digits in front of a signed line."""

_T = TypeVar("_T")


class Link:
  """A connected socket, and what is known of the process beyond."""

  def __init__(self, connection: socket.socket, index: int = -1, host: str = "?"):
    """Takes over a connected socket; index and host are of the process beyond."""
    self.socket, self.index, self.host = connection, index, host
    self.early: list[Message] = []
    """Messages received after the verdict, kept for the next reader."""
    self._received = b""
    self._limit = HELLO_BYTES
    self._keys: tuple[bytes, bytes] | None = None
    self._sent = self._heard = 0
    self._sending = threading.Lock()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in SILENCE.items():
      if hasattr(socket, name):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

  def __str__(self) -> str:
    return f"process {self.index} ({self.host})"

  def greeted(self, key: bytes | None, is_host: bool) -> None:
    """From here on messages may be long and, where there is a key, are signed."""
    self._limit = MESSAGE_BYTES
    if key is not None:
      ours, theirs = (b"host", b"caller") if is_host else (b"caller", b"host")
      self._keys = secret.code(key, ours), secret.code(key, theirs)

  def send(self, message: Message) -> bool:
    """Whether it went out; False where nobody is left to hear it."""
    line = json.dumps(message).encode()
    # Numbered and sent in one order, whichever threads have something to say.
    with self._sending:
      if self._keys:
        line = _signature(self._keys[0], self._sent, line) + line
        self._sent += 1
      try:
        self.socket.sendall(line + b"\n")
      except OSError:
        return False
    return True

  def receive(self) -> list[Message]:
    """What came since the last call; waits for the first byte.

    Raises:
      OSError: the connection is closed or broken (ConnectionError), or nothing came
        in the socket's timeout (TimeoutError).
      ValueError: what came is not ours.
    """
    data = self.socket.recv(1 << 16)
    if not data:
      raise ConnectionResetError("closed by the other side")
    *lines, self._received = (self._received + data).split(b"\n")
    if any(len(line) > self._limit for line in (*lines, self._received)):
      raise ValueError("too long a message")
    return [self._message(line) for line in lines]

  def close(self) -> None:
    self.socket.close()

  def _message(self, line: bytes) -> Message:
    if self._keys:
      given, line = line[:_CODE], line[_CODE:]
      if not hmac.compare_digest(given, _signature(self._keys[1], self._heard, line)):
        raise ValueError("not signed with this job's secret")
      self._heard += 1
    message = files.parse_json(line, _DEPTH)
    if not isinstance(message, dict):
      raise ValueError("not a message")
    return message


def field(message: Message, name: str, kind: type[_T]) -> _T:
  """A value of a message; ValueError if it is not there, or of another type."""
  value = message.get(name)
  if type(value) is not kind:
    raise ValueError(f"no {name} of type {kind.__name__}")
  return value


def printable(text: str, limit: int = 200) -> str:
  """Text of another process as a part of one line: no escape codes, no novel."""
  text = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
  return text if len(text) <= limit else text[:limit] + "..."


def _signature(key: bytes, number: int, line: bytes) -> bytes:
  return secret.code(key, b"%d\0" % number + line).hex().encode()
