"""Where the processes of a job meet before the runtime connects them.

Process 0 listens at the coordinator's address, which firewalls must leave open anyway,
since the runtime uses it a moment later. The others call until it answers, identify
themselves, send the settings they were started with, and get its verdict. Only then does
jax start: it would silently connect processes that disagree on their number, and a
failure inside its `initialize` is an abort that cannot be caught.

    caller   {"moejax": 1, "nonce": c, "signed": whether it has a secret}
    host     {"moejax": 1, "nonce": s, "signed": ..., "proof": that it knows the secret}
    caller   {"index": ..., "host": its machine, "facts": what it was started with}
    host     {"error": ..., "code": ..., "host": ...}     the verdict, to all at once

With a secret (`secret`) the last two and all later messages are signed, so a stranger can
neither join nor end the meeting. Without one, anyone who reaches the port and uses this
protocol can do both, since a contradiction ends the job, as it should among honest
processes. In either case an invalid message ends its own connection and nothing else.

The connections stay open: `liveness` learns from them which processes died.
"""

import collections
import dataclasses
import errno
import hmac
import random
import secrets
import selectors
import socket
import time

from moejax.errors import EXIT_CODE, DisagreementError, PeerLostError, UserError
from moejax.launch import agreement, secret
from moejax.launch.agreement import Facts
from moejax.launch.link import Link, Message, field, printable
from moejax.launch.listening import listen, split_address

JOIN_SECONDS = 120.0
"""How long a process waits for the others, unless --join_timeout says otherwise."""

_PROTOCOL = 1
_PROOF = b"process 0 of this job"
_COUNT_FACT = "--num_processes"
_MAX_COUNT = 1 << 20
_MAX_FACTS = 10_000
_RETRY_SECONDS = 0.2
_SETTLE_SECONDS = 3.0
"""How long to wait, after the first contradiction, for others that must be told."""
_CALL_SECONDS = 10.0
"""How long a caller may take to identify itself, and later to receive the verdict."""
_SPARE_CALLERS = 64
"""Most undecided connections beyond the expected ones, and most rivals for seats."""


def meet(
  address: str,
  count: int,
  index: int,
  facts: Facts,
  timeout: float,
  shared: bytes | None = None,
) -> list[Link]:
  """Waits for all processes and makes sure that they were started alike.

  Args:
    address: host:port of process 0.
    count: number of processes.
    index: of this process, from 0.
    facts: what must be the same on all of them.
    timeout: seconds after which a process gives up.
    shared: the job's secret; only processes that know it are let in.

  Returns:
    On process 0 a link to each other process; elsewhere the link to it.

  Raises:
    UserError: the address is malformed, or process 0 cannot listen there.
    PeerLostError: process 0 does not answer, or processes are missing.
    DisagreementError: they differ. If some differ or are missing, all raise one error.
  """
  host, port = split_address(address)
  facts = {_COUNT_FACT: count, **facts}
  if index > 0:
    return [_join(host, port, index, facts, timeout, shared)]
  with listen(address) as listener:
    return _Host(listener, address, count, facts, timeout, shared).gather()


@dataclasses.dataclass(eq=False, kw_only=True)
class _Caller:
  """A connection whose process has not identified itself yet."""

  link: Link
  address: str
  deadline: float
  greeted: bool = False


class _Host:
  """Process 0 of a meeting: admits the callers, then sends all of them the verdict."""

  def __init__(
    self,
    listener: socket.socket,
    address: str,
    count: int,
    facts: Facts,
    timeout: float,
    shared: bytes | None,
  ):
    self._listener, self._address, self._count = listener, address, count
    self._timeout, self._secret = timeout, shared
    self._deadline = time.monotonic() + timeout
    self._selector = selectors.DefaultSelector()
    self._callers: dict[Link, _Caller] = {}
    self._seats: dict[int, Link] = {}
    self._rivals: list[Link] = []
    """Processes that claim an index already taken."""
    self._claimed: dict[int, list[str]] = {}
    """By index claimed more than once: the machines that claim it."""
    self._facts: dict[int, Facts] = {0: facts}
    self._stranger = ""
    """Why the last caller that spoke this protocol was turned away."""

  def gather(self) -> list[Link]:
    self._listener.setblocking(False)
    self._selector.register(self._listener, selectors.EVENT_READ, None)
    while len(self._seats) < self._count - 1 or self._contradicts():
      now = time.monotonic()
      if now >= self._deadline:
        break
      deadlines = [self._deadline, *(c.deadline for c in self._callers.values())]
      for key, _ in self._selector.select(max(0.0, min(deadlines) - now)):
        if key.data is None:
          self._accept()
        elif key.data.socket.fileno() >= 0:  # Not dropped since.
          self._hear(key.data)
      self._drop_late()
    self._selector.close()
    for link in self._callers:
      link.close()
    # Frees the port for the runtime before the others look for it there.
    self._listener.close()
    return self._close()

  def _accept(self) -> None:
    try:
      connection, address = self._listener.accept()
      connection.setblocking(False)
      link = Link(connection)
    except OSError as error:
      # The caller is gone already, or no more files may be opened.
      if error.errno in (errno.EMFILE, errno.ENFILE) and self._callers:
        self._make_room()
      return
    if len(self._callers) >= self._count + _SPARE_CALLERS:
      self._make_room()
    deadline = time.monotonic() + _CALL_SECONDS
    self._callers[link] = _Caller(link=link, address=address[0], deadline=deadline)
    self._selector.register(connection, selectors.EVENT_READ, link)

  def _make_room(self) -> None:
    """Drops a random caller from the address with the most callers.

    Not the oldest: in a flood that would always be a process that is slow for a moment.
    """
    by_address = collections.Counter(c.address for c in self._callers.values())
    busiest = by_address.most_common(1)[0][0]
    self._drop(
      random.choice([x for x, c in self._callers.items() if c.address == busiest])
    )

  def _drop_late(self) -> None:
    now = time.monotonic()
    for link in [x for x, caller in self._callers.items() if caller.deadline <= now]:
      self._drop(link)

  def _drop(self, link: Link) -> None:
    self._selector.unregister(link.socket)
    caller = self._callers.pop(link, None)
    if caller is not None and caller.greeted and self._secret is not None:
      self._stranger = f"some do not know process 0's {secret.ENV}"
    if self._seats.get(link.index) is link:
      del self._seats[link.index], self._facts[link.index]
    if link in self._rivals:
      self._rivals.remove(link)
    link.close()

  def _hear(self, link: Link) -> None:
    try:
      messages = link.receive()
      if not messages:
        return
      caller = self._callers.get(link)
      if caller is None or len(messages) > 1:
        raise ValueError("it sent an unexpected message")
      if caller.greeted:
        self._seat(link, messages[0])
      else:
        self._greet(caller, messages[0])
    except BlockingIOError:
      return
    except (OSError, ValueError):
      # Disconnected, or a stranger: a port scan, a health check, another job's runtime.
      self._drop(link)

  def _greet(self, caller: _Caller, message: Message) -> None:
    if field(message, "moejax", int) != _PROTOCOL:
      raise ValueError("another protocol")
    signed, nonce = field(message, "signed", bool), secrets.token_hex(16)
    reply = {"moejax": _PROTOCOL, "nonce": nonce, "signed": self._secret is not None}
    key = None
    if self._secret is not None:
      key = secret.session_key(self._secret, field(message, "nonce", str), nonce)
      reply["proof"] = secret.code(key, _PROOF).hex()
    if not caller.link.send(reply):
      raise ConnectionResetError("closed by the other side")
    if signed != (self._secret is not None):
      who = ("some", "process 0") if signed else ("process 0", "some")
      self._stranger = f"{who[0]} had a {secret.ENV} and {who[1]} had none"
      raise ValueError(self._stranger)
    caller.link.greeted(key, is_host=True)
    caller.greeted = True

  def _seat(self, link: Link, message: Message) -> None:
    index, facts = field(message, "index", int), _checked(field(message, "facts", dict))
    count = facts[_COUNT_FACT]
    # A process of a larger job is seated, so that all can be told that they disagree.
    if not 0 < index < count or (count == self._count and index >= self._count):
      raise ValueError(f"there is no process {index}")
    link.host = printable(field(message, "host", str), 64)
    if index in self._seats and len(self._rivals) >= _SPARE_CALLERS:
      raise ValueError("too many claim this index")
    del self._callers[link]
    link.index = index
    if index in self._seats:
      self._rivals.append(link)
      hosts = self._claimed.setdefault(index, [self._seats[index].host])
      hosts.append(link.host)
    else:
      self._seats[index], self._facts[index] = link, facts
    if self._contradicts():
      self._deadline = min(self._deadline, time.monotonic() + _SETTLE_SECONDS)

  def _contradicts(self) -> bool:
    counts = {facts[_COUNT_FACT] for facts in self._facts.values()}
    return len(counts) > 1 or bool(self._claimed)

  def _close(self) -> list[Link]:
    error: type[UserError] = DisagreementError
    text = self._twice() or agreement.disagreement(self._facts)
    if not text and len(self._seats) < self._count - 1:
      error = PeerLostError
      text = agreement.missing(self._count, self._facts, self._timeout, self._address)
      text += f" Of those who called, {self._stranger}." if self._stranger else ""
    verdict = {"error": text, "code": error.exit_code, "host": socket.gethostname()}
    links = [*self._seats.values(), *self._rivals]
    for link in links:
      link.socket.settimeout(_CALL_SECONDS)
      link.send(verdict)
      link.socket.settimeout(None)
    if text:
      for link in links:
        link.close()
      raise error(text)
    return sorted(links, key=lambda link: link.index)

  def _twice(self) -> str:
    """Returns the error about indices given to several processes; empty if none."""
    text = "; ".join(
      f"--process_id={index} was given to several processes, on {', '.join(hosts)}"
      for index, hosts in sorted(self._claimed.items())
    )
    return text and text + ". They are numbered from 0, each number once."


def _checked(facts: Message) -> Facts:
  """Returns a process's facts; ValueError if they cannot be compared or printed."""
  count = facts.get(_COUNT_FACT)
  if type(count) is not int or not 1 < count <= _MAX_COUNT or len(facts) > _MAX_FACTS:
    raise ValueError("no facts")
  if any(printable(name) != name for name in facts):
    raise ValueError("a fact whose name cannot be printed")
  return facts


def _join(
  host: str, port: int, index: int, facts: Facts, timeout: float, shared: bytes | None
) -> Link:
  me = {"index": index, "host": socket.gethostname(), "facts": facts}
  deadline = time.monotonic() + timeout
  while True:
    try:
      link, verdict = _ask(host, port, me, deadline, shared)
      break
    except (OSError, ValueError) as error:
      reason = getattr(error, "strerror", None) or str(error)
    if time.monotonic() > deadline:
      raise PeerLostError(
        f"--coordinator_address={host}:{port}: process 0 did not answer within "
        f"{timeout:g} s (--join_timeout); last: {reason}. Look at process 0's own "
        "output, and check whether this machine reaches that port."
      )
    time.sleep(_RETRY_SECONDS)
  if not verdict["error"]:
    return link
  link.close()
  refusals = {error.exit_code: error for error in (DisagreementError, PeerLostError)}
  raise refusals.get(verdict["code"], UserError)(printable(verdict["error"], 20_000))


def _ask(
  host: str, port: int, me: Message, deadline: float, shared: bytes | None
) -> tuple[Link, Message]:
  """Calls process 0 once, for its verdict; OSError or ValueError if that fails."""
  left = max(1.0, min(5.0, deadline - time.monotonic()))
  connection = socket.create_connection((host, port), timeout=left)
  try:
    if connection.getsockname() == connection.getpeername():
      # If nobody listens there, a socket that was given that port connects to itself.
      raise ConnectionRefusedError("nobody listens there")
    link = Link(connection, 0)
    _greet_host(link, shared)
    if not link.send(me):
      raise ConnectionResetError("closed by the other side")
    # Process 0 answers by its own deadline, and may have started later than we did.
    wait = max(deadline, time.monotonic()) + 2 * _SETTLE_SECONDS
    verdict, *link.early = _messages(link, wait)
    field(verdict, "error", str)
    if field(verdict, "code", int) < EXIT_CODE:
      raise ValueError("something else listens there")
    link.host = printable(field(verdict, "host", str), 64)
    connection.settimeout(None)
  except BaseException:
    connection.close()
    raise
  return link, verdict


def _greet_host(link: Link, shared: bytes | None) -> None:
  """Checks that process 0 of this job is at the other end; ValueError if not."""
  nonce = secrets.token_hex(16)
  link.send({"moejax": _PROTOCOL, "nonce": nonce, "signed": shared is not None})
  try:
    reply, *more = _messages(link, time.monotonic() + _CALL_SECONDS)
    theirs, signed = field(reply, "nonce", str), field(reply, "signed", bool)
  except ValueError:
    raise ValueError("something else listens there") from None
  if more or signed != (shared is not None):
    who = ("process 0", "this process") if signed else ("this process", "process 0")
    raise ValueError(f"{who[0]} has a {secret.ENV} and {who[1]} has none")
  key = None
  if shared is not None:
    key = secret.session_key(shared, nonce, theirs)
    proof = secret.code(key, _PROOF).hex()
    if not hmac.compare_digest(proof.encode(), field(reply, "proof", str).encode()):
      raise ValueError(
        f"the process that listens there does not know this job's {secret.ENV}"
      )
  link.greeted(key, is_host=False)


def _messages(link: Link, deadline: float) -> list[Message]:
  """Returns the next messages, at least one; TimeoutError after the deadline."""
  while (left := deadline - time.monotonic()) > 0:
    link.socket.settimeout(left)
    if messages := link.receive():
      return messages
  raise TimeoutError("no answer")
