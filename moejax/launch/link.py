"""A connection to another process of the job, which carries JSON lines.

Anyone who reaches the port can write to it, so no input is trusted unchecked: the size
and depth of a message are limited, `field` checks names and types, and if the job has a
secret each line after the greeting carries an HMAC, keyed by the secret, over the line,
its direction and its number.
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
"""Seconds, seconds, probes, and milliseconds with data in flight: a vanished machine is
noticed after 30 s. The kernels probe and answer, so a process that compiles for minutes,
or is stopped, is not taken for dead."""

HELLO_BYTES = 1024
"""Most bytes of a message before the greeting is complete."""
MESSAGE_BYTES = 1 << 18
"""Most bytes of a later message: ten times the size of a process's facts."""
_DEPTH = 8
_CODE = 64
"""Hexadecimal digits of the HMAC in front of a signed line."""

_T = TypeVar("_T")


class Link:
  """A connected socket, and what is known of the process at its other end."""

  def __init__(self, connection: socket.socket, index: int = -1, host: str = "?"):
    """Takes over a connected socket; index and host are the other process's."""
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
    """Allows long messages from now on and, given a key, signs and verifies them."""
    self._limit = MESSAGE_BYTES
    if key is not None:
      ours, theirs = (b"host", b"caller") if is_host else (b"caller", b"host")
      self._keys = secret.code(key, ours), secret.code(key, theirs)

  def send(self, message: Message) -> bool:
    """Sends a message; returns False if the connection is closed or broken."""
    line = json.dumps(message).encode()
    # Sent in the order of their numbers, whichever threads send.
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
    """Returns the messages since the last call; waits for the first byte.

    Raises:
      OSError: the connection is closed or broken (ConnectionError), or nothing came
        within the socket's timeout (TimeoutError).
      ValueError: a message is too long, malformed or wrongly signed.
    """
    data = self.socket.recv(1 << 16)
    if not data:
      raise ConnectionResetError("closed by the other side")
    *lines, self._received = (self._received + data).split(b"\n")
    if any(len(line) > self._limit for line in (*lines, self._received)):
      raise ValueError("the message is too long")
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
  """Returns a value of a message; ValueError if it is missing or of another type."""
  value = message.get(name)
  if type(value) is not kind:
    raise ValueError(f"no {name} of type {kind.__name__}")
  return value


def printable(text: str, limit: int = 200) -> str:
  """Returns another process's text fit for one line: no escape codes, cut at `limit`."""
  text = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
  return text if len(text) <= limit else text[:limit] + "..."


def _signature(key: bytes, number: int, line: bytes) -> bytes:
  return secret.code(key, b"%d\0" % number + line).hex().encode()
