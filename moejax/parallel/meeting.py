"""Where the processes of a job meet, before the runtime joins them.

Process 0 listens at the coordinator's address, which the runtime will use a moment
later and which is open in every firewall for that reason. The others call until it
answers, say who they are and what they were started with, and get its verdict. Only
then does jax begin: it connects processes that disagree on their number without a
word, and what fails inside its initialize ends in an abort that nobody can catch.

The connections stay open: `liveness` learns from them who died.
"""

import json
import os
import selectors
import socket
import time
from typing import Any

from moejax.errors import DisagreementError, PeerLostError, UserError
from moejax.parallel import agreement
from moejax.parallel.agreement import Facts

Message = dict[str, Any]

JOIN_SECONDS = 120.0
"""After so long without the others a process gives up, unless --join_timeout says so."""

SILENCE = {
  "TCP_KEEPIDLE": 10,
  "TCP_KEEPINTVL": 5,
  "TCP_KEEPCNT": 4,
  "TCP_USER_TIMEOUT": 30_000,
}
"""Seconds, seconds, times, and milliseconds where something is under way: a machine
that vanished is noticed after 30 s. The kernels ask and answer, so a process that
compiles for minutes, or is stopped, is not taken for a dead one."""

_COUNT_FACT = "--num_processes"
_GREETING = "moejax"
_LIMIT = 1 << 22
"""Bytes of a message; more is not from us."""
_RETRY_SECONDS = 0.2
_SETTLE_SECONDS = 3.0
"""After the first contradiction, how long to wait for others that shall hear of it."""
_BIND_SECONDS = 10.0
"""A predecessor that was killed may hold the port for a moment longer."""


class Link:
  """A connection to another process, over which JSON lines go."""

  def __init__(self, connection: socket.socket, index: int = -1, host: str = "?"):
    """Takes over a connected socket; index and host are of the process beyond."""
    self.socket, self.index, self.host = connection, index, host
    self._received = b""
    self.early: list[Message] = []
    """What came right behind the verdict, for who reads next."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in SILENCE.items():
      if hasattr(socket, name):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

  def __str__(self) -> str:
    return f"process {self.index} ({self.host})"

  def send(self, message: Message) -> bool:
    """Whether it went out; False where nobody is left to hear it."""
    try:
      self.socket.sendall(json.dumps(message).encode() + b"\n")
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
    if len(self._received) > _LIMIT:
      raise ValueError("no end of a line")
    messages = [json.loads(line) for line in lines]
    if not all(isinstance(message, dict) for message in messages):
      raise ValueError("not a message")
    return messages

  def close(self) -> None:
    self.socket.close()


def meet(
  address: str, count: int, index: int, facts: Facts, timeout: float
) -> list[Link]:
  """Waits for all processes and makes sure that they were started alike.

  Args:
    address: host:port of process 0.
    count: of processes.
    index: of this one, from 0.
    facts: what must be the same on all of them.
    timeout: seconds after which a process gives up.

  Returns:
    On process 0 a link to each other process; elsewhere the one to process 0.

  Raises:
    UserError: no such address, or process 0 cannot listen there.
    PeerLostError: process 0 does not answer, or processes are missing.
    DisagreementError: they differ. Missing and differing is told to all alike.
  """
  host, port = split_address(address)
  facts = {_COUNT_FACT: count, **facts}
  if index > 0:
    return [_join(host, port, index, facts, timeout)]
  listener = _listen(port, address)
  try:
    return _Host(listener, address, count, facts, timeout).gather()
  finally:
    listener.close()


def split_address(address: str, name: str = "--coordinator_address") -> tuple[str, int]:
  """Host and port of `host:port`; UserError, with the name it was given by, if none."""
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
    raise UserError(
      f"{name}={address}: not of the form HOST:PORT. Give the name of "
      "process 0's machine and a free port of it, the same on every process."
    )
  return host.strip("[]"), int(port)


def _listen(port: int, address: str) -> socket.socket:
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  # Where the runtime will listen, for the same reasons (a forwarded port).
  bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "")
  port = split_address(bound, "JAX_COORDINATOR_BIND_ADDRESS")[1] if bound else port
  deadline = time.monotonic() + _BIND_SECONDS
  while True:
    try:
      return socket.create_server(
        ("", port), family=family, backlog=1024, dualstack_ipv6=both
      )
    except OSError as error:
      if time.monotonic() > deadline:
        raise UserError(
          f"--coordinator_address={address}: process 0 cannot listen at port {port} "
          f"({error.strerror}). Choose another port, or end the process that has it: "
          "a second one with --process_id=0?"
        ) from error
    time.sleep(_RETRY_SECONDS)


class _Host:
  """Process 0 of a meeting: seats whoever comes, then tells all of them the verdict."""

  def __init__(
    self,
    listener: socket.socket,
    address: str,
    count: int,
    facts: Facts,
    timeout: float,
  ):
    self._listener, self._address, self._count = listener, address, count
    self._timeout = timeout
    self._deadline = time.monotonic() + timeout
    self._selector = selectors.DefaultSelector()
    self._callers: set[Link] = set()
    """Who is connected and has not said who it is."""
    self._links: list[Link] = []
    self._facts: dict[int, Facts] = {0: facts}
    self._twice: dict[int, list[str]] = {}
    """Hosts of those who claim an index that is taken."""

  def gather(self) -> list[Link]:
    self._selector.register(self._listener, selectors.EVENT_READ, None)
    while len(self._links) < self._count - 1 or self._contradicts():
      left = self._deadline - time.monotonic()
      if left <= 0:
        break
      for key, _ in self._selector.select(left):
        if key.data is None:
          self._accept()
        else:
          self._hear(key.data)
    self._selector.close()
    for link in self._callers:
      link.close()
    # Free for the runtime, before anyone is told to look for it there.
    self._listener.close()
    return self._close()

  def _accept(self) -> None:
    try:
      connection, _ = self._listener.accept()
    except OSError:
      return  # gone before it was let in
    self._callers.add(link := Link(connection))
    self._selector.register(connection, selectors.EVENT_READ, link)

  def _hear(self, link: Link) -> None:
    try:
      messages = link.receive()
      for message in messages:
        self._seat(link, message)
    except (OSError, ValueError, LookupError, TypeError):
      # Gone again, or a stranger: a port scan, a health check, another job's runtime.
      self._selector.unregister(link.socket)
      self._callers.discard(link)
      if link in self._links:
        self._links.remove(link)
        self._facts.pop(link.index, None)
      link.close()

  def _seat(self, link: Link, message: Message) -> None:
    link.index, link.host = int(message[_GREETING]), str(message["host"])
    if link.index in self._facts:
      others = [x.host for x in self._links if x.index == link.index]
      self._twice.setdefault(link.index, others or [socket.gethostname()])
      self._twice[link.index].append(link.host)
    else:
      self._facts[link.index] = dict(message["facts"])
    self._callers.discard(link)
    self._links.append(link)
    if self._contradicts():
      self._deadline = min(self._deadline, time.monotonic() + _SETTLE_SECONDS)

  def _contradicts(self) -> bool:
    counts = {facts.get(_COUNT_FACT) for facts in self._facts.values()}
    return len(counts) > 1 or bool(self._twice)

  def _close(self) -> list[Link]:
    error: type[UserError] = DisagreementError
    text = "; ".join(
      f"--process_id={index} was given to several processes, on {', '.join(hosts)}"
      for index, hosts in self._twice.items()
    )
    if text:
      text += ". They are numbered from 0, each number once."
    text = text or agreement.disagreement(self._facts)
    if not text and len(self._links) < self._count - 1:
      error = PeerLostError
      text = agreement.missing(self._count, self._facts, self._timeout, self._address)
    verdict = {"error": text, "code": error.exit_code, "host": socket.gethostname()}
    for link in self._links:
      link.send(verdict)
    if text:
      for link in self._links:
        link.close()
      raise error(text)
    return sorted(self._links, key=lambda link: link.index)


def _join(host: str, port: int, index: int, facts: Facts, timeout: float) -> Link:
  hello = {_GREETING: index, "host": socket.gethostname(), "facts": facts}
  deadline = time.monotonic() + timeout
  while True:
    try:
      link, verdict = _ask(host, port, hello, timeout, deadline)
      break
    except (OSError, ValueError) as error:
      reason = getattr(error, "strerror", None) or str(error)
    if time.monotonic() > deadline:
      raise PeerLostError(
        f"--coordinator_address={host}:{port}: process 0 did not answer within "
        f"{timeout:g} s (--join_timeout); last: {reason}. Look at process 0's own "
        "output, and whether this machine reaches that port."
      )
    time.sleep(_RETRY_SECONDS)
  if not verdict["error"]:
    return link
  link.close()
  refusals = {error.exit_code: error for error in (DisagreementError, PeerLostError)}
  raise refusals[verdict["code"]](verdict["error"])


def _ask(
  host: str, port: int, hello: Message, timeout: float, deadline: float
) -> tuple[Link, Message]:
  """One call to process 0: OSError or ValueError where it comes to nothing."""
  left = max(1.0, min(5.0, deadline - time.monotonic()))
  connection = socket.create_connection((host, port), timeout=left)
  try:
    if connection.getsockname() == connection.getpeername():
      # TCP lets a socket call itself when nobody listens at a port it was given.
      raise ConnectionRefusedError("nobody listens there")
    link = Link(connection, 0)
    # Process 0 answers when its own patience ends, and may have begun later than we.
    connection.settimeout(timeout + 2 * _SETTLE_SECONDS)
    if not link.send(hello):
      raise ConnectionResetError("closed by the other side")
    messages: list[Message] = []
    while not messages:
      messages = link.receive()
    verdict, *link.early = messages
    if "error" not in verdict:
      raise ValueError("something else listens there")
    link.host = verdict["host"]
    connection.settimeout(None)
  except BaseException:
    connection.close()
    raise
  return link, verdict
