"""Strangers at the port: whatever they send, process 0 lives and the right ones meet."""

import concurrent.futures
import contextlib
import json
import random
import secrets
import socket
import struct
import threading
import time

import pytest

from moejax.cli import launch_local
from moejax.errors import DisagreementError, PeerLostError, UserError
from moejax.launch import link as link_lib
from moejax.launch import listening, meeting, secret

SECRET = b"a secret of this job, not of another"
FACTS = {"--config.train.seed": 0}


@contextlib.contextmanager
def process_0(shared=None, count=3, timeout=60.0, facts=None):
  """A meeting that waits: its port, and the future of what process 0 gets."""
  port = launch_local.free_port()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    address = f"127.0.0.1:{port}"
    future = pool.submit(meeting.meet, address, count, 0, facts or FACTS, timeout, shared)
    call(port).close()
    yield port, future


def call(port: int) -> socket.socket:
  deadline = time.monotonic() + 3
  while True:
    try:
      return socket.create_connection(("127.0.0.1", port), timeout=10)
    except OSError:
      assert time.monotonic() < deadline
      time.sleep(0.02)


def others(port: int, shared=None, count=3, timeout=60.0):
  """The links of all other processes, which call at the same time."""

  def one(index):
    return meeting.meet(f"127.0.0.1:{port}", count, index, FACTS, timeout, shared)

  with concurrent.futures.ThreadPoolExecutor(count) as pool:
    futures = [pool.submit(one, index) for index in range(1, count)]
  return [future.result()[0] for future in futures]


def assert_met(future, links) -> None:
  ours = future.result(timeout=60)
  assert [link.index for link in ours] == list(range(1, len(links) + 1))
  for link in (*ours, *links):
    link.close()


# ------------------------------------------------------------------------------- fuzz

HELLO = {"moejax": 1, "nonce": "0", "signed": False}
GOOD = {"index": 1, "host": "x", "facts": {"--num_processes": 3}}
DEEP = "[" * 2000 + "]" * 2000

RAW = [
  b"\n" * 50_000,
  b"[" * 100_000 + b"\n",
  b'{"a":' * 50_000 + b"\n",
  b"x" * 3_000_000,
  b"{}" + b" " * 2_000_000 + b"\n",
  b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
  b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(40),
  b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
  b"\xff\xfe\x00\n",
  b"null\n",
  b"1e999\n",
  b"[]\n",
  b'"\\ud800"\n',
  b"9" * 900 + b"\n",
  b'{"moejax": 1}\n',
  b'{"moejax": Infinity, "nonce": "", "signed": false}\n',
  b'{"moejax": true, "nonce": "", "signed": false}\n',
  b'{"moejax": 1, "nonce": "\\ud800", "signed": true}\n',
  b'{"moejax": 1, "nonce": "", "signed": 0}\n',
  json.dumps(HELLO).encode() + b"\n" + json.dumps(GOOD).encode() + b"\n",
]
"""What is sent without a greeting."""

INTRODUCTIONS = [
  *(
    GOOD | {"index": index}
    for index in (-1, 0, 3, 4, 10**300, 1.0, float("inf"), float("nan"), True, "1", None)
  ),
  *(GOOD | {"host": host} for host in (None, 3, ["x"], {})),
  *(GOOD | {"facts": facts} for facts in (None, [], {}, "x", 3)),
  *(
    GOOD | {"facts": {"--num_processes": count}}
    for count in ([], {}, None, "3", 3.0, True, 0, 1, -3, 10**9, float("inf"))
  ),
  GOOD | {"facts": {"--num_processes": 3, "\x1b[2J": 1}},
  GOOD | {"facts": {"--num_processes": 3, "x" * 1000: 1}},
  GOOD | {"facts": {"--num_processes": 3} | {str(i): i for i in range(12_000)}},
  GOOD | {"facts": {"--num_processes": 3, "deep": json.loads(DEEP[1950:2050])}},
  GOOD | {"index": 7, "facts": {"--num_processes": 3}},
  {},
  HELLO,
]
"""What is sent after a greeting as it should be; none of it can be seated."""


def greeted(port: int, message: object) -> socket.socket:
  stranger = call(port)
  with contextlib.suppress(OSError):  # process 0 hangs up, and may do so at any byte
    stranger.sendall(json.dumps(HELLO).encode() + b"\n")
    stranger.recv(1 << 12)
    stranger.sendall(json.dumps(message).encode() + b"\n")
  return stranger


def one_attack(port: int, dice: random.Random) -> socket.socket:
  """One connection with one message, at random."""
  kind = dice.randrange(4)
  if kind == 0:
    return greeted(port, dice.choice(INTRODUCTIONS))
  if kind == 1:
    text = dice.choice(RAW)
  elif kind == 2:
    text = dice.randbytes(dice.randrange(2000))
  else:
    garbled = bytearray(json.dumps(dice.choice((HELLO, GOOD))).encode() + b"\n")
    for _ in range(dice.randrange(1, 4)):
      garbled[dice.randrange(len(garbled))] = dice.randrange(256)
    text = bytes(garbled)[: dice.randrange(1, len(garbled) + 1)]
  stranger = call(port)
  with contextlib.suppress(OSError):
    stranger.sendall(text)
  return stranger


def attack(port: int, dice: random.Random, held: list[socket.socket]) -> None:
  """Some connections stay open and silent, some are reset, most are closed."""
  stranger = one_attack(port, dice)
  if dice.random() < 0.1:
    held.append(stranger)
    if len(held) > 300:
      held.pop(0).close()
    return
  if dice.random() < 0.2:
    now = struct.pack("ii", 1, 0)
    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
  stranger.close()


def fuzz(shared: bytes | None, attacks: int, seed: int) -> None:
  """Attacks first, then a flood while the others come."""
  dice, held = random.Random(seed), []
  with process_0(shared, timeout=600.0) as (port, future):
    for _ in range(attacks):
      attack(port, dice, held)
    assert not future.done()
    stop = threading.Event()

    def flood():
      while not stop.is_set():
        with contextlib.suppress(AssertionError):  # the meeting is over
          attack(port, dice, held)

    attacker = threading.Thread(target=flood)
    attacker.start()
    try:
      links = others(port, shared, timeout=120.0)
    finally:
      stop.set()
      attacker.join()
    assert_met(future, links)
  for stranger in held:
    stranger.close()


@pytest.mark.parametrize("shared", [None, SECRET], ids=["open", "secret"])
def test_the_right_processes_meet_among_strangers(shared):
  """Some hundred broken, forged, endless and half-open calls, and a flood meanwhile."""
  fuzz(shared, attacks=300, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [None, SECRET], ids=["open", "secret"])
def test_the_right_processes_meet_among_ten_thousand_strangers(shared):
  """The same with 10,000 of them."""
  fuzz(shared, attacks=10_000, seed=1)


def test_an_introduction_that_is_none_ends_its_connection_alone():
  """No seat and no exception for any: process 0 hangs up, and the right ones meet."""
  with process_0() as (port, future):
    for message in INTRODUCTIONS:
      with greeted(port, message) as stranger, contextlib.suppress(ConnectionError):
        assert stranger.recv(1) == b"", message
    assert_met(future, others(port))


def test_a_slow_caller_is_hung_up_on_and_blocks_nobody(monkeypatch):
  """A byte at a time, and a mute one: the time is for the whole, not for each byte."""
  monkeypatch.setattr(meeting, "_CALL_SECONDS", 1.0)
  with process_0() as (port, future), call(port) as mute, call(port) as slow:
    began = time.monotonic()
    with pytest.raises(OSError):
      while time.monotonic() < began + 10:
        slow.sendall(b" ")
        time.sleep(0.05)
    assert time.monotonic() - began < 5
    mute.settimeout(5)
    assert mute.recv(1) == b""
    assert_met(future, others(port))


def test_idle_connections_take_no_places(monkeypatch):
  """Five times as many as may be undecided at once, all held open."""
  with process_0() as (port, future), contextlib.ExitStack() as stack:
    began = time.monotonic()
    for _ in range(5 * meeting._SPARE_CALLERS):
      stack.enter_context(call(port))
    assert_met(future, others(port))
    assert time.monotonic() - began < meeting._CALL_SECONDS


def test_a_seated_process_that_speaks_loses_its_seat():
  """It has nothing to say before the verdict; its seat is free for the right one."""
  with process_0() as (port, future):
    with greeted(port, GOOD) as stranger:
      stranger.sendall(json.dumps(GOOD | {"index": 2}).encode() + b"\n")
      with contextlib.suppress(ConnectionError):
        assert stranger.recv(1) == b""
    assert_met(future, others(port))


# ----------------------------------------------------------------------------- secret


def test_without_the_secret_nobody_is_seated():
  """All that a stranger can see on the wire, done right but for the secret."""
  with process_0(SECRET) as (port, future):
    for key in (None, secrets.token_bytes(32)):
      with call(port) as stranger:
        caller = link_lib.Link(stranger)
        caller.send(HELLO | {"signed": True})
        (reply,) = caller.receive()
        assert reply["signed"] and "proof" in reply
        caller.greeted(key, is_host=False)
        caller.send(GOOD)
        assert stranger.recv(1) == b""
    assert_met(future, others(port, SECRET))


@pytest.mark.parametrize(
  ("ours", "theirs", "at_host", "at_caller"),
  [
    (SECRET, b"another", "do not know process 0's", "does not know this job's"),
    (SECRET, None, "process 0 had a .* and some had none", "process 0 has a .* this"),
    (None, SECRET, "some had a .* and process 0 had none", "this process has a .* proc"),
  ],
)
def test_another_secret_is_told_on_both_sides(ours, theirs, at_host, at_caller):
  """Code 3 after --join_timeout, since it may be a stranger's; why is said on both."""
  with process_0(ours, count=2, timeout=2.0) as (port, future):
    with pytest.raises(PeerLostError, match=f"{at_caller}.*"):
      meeting.meet(f"127.0.0.1:{port}", 2, 1, FACTS, 1.0, theirs)
    with pytest.raises(PeerLostError, match=f"Of those who called, .*{at_host}"):
      future.result()


class Wire:
  """A relay between callers and process 0 that keeps, and may change, what passes."""

  def __init__(self, to: int, change=lambda data: data):
    self.seen, self._to, self._change = b"", to, change
    self._open = [socket.create_server(("127.0.0.1", 0))]
    self.port = self._open[0].getsockname()[1]

  def __enter__(self) -> "Wire":
    threading.Thread(target=self._serve, daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    for opened in self._open:
      with contextlib.suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)
      opened.close()

  def _serve(self) -> None:
    with contextlib.suppress(OSError):
      while True:
        caller, _ = self._open[0].accept()
        self._open.append(caller)
        host = socket.create_connection(("127.0.0.1", self._to))
        self._open.append(host)
        ways = ((caller, host, self._change), (host, caller, lambda data: data))
        for way in ways:
          threading.Thread(target=self._pass_on, args=way, daemon=True).start()

  def _pass_on(self, source, target, change) -> None:
    with contextlib.suppress(OSError):
      while data := source.recv(1 << 16):
        self.seen += data
        target.sendall(change(data))
      target.shutdown(socket.SHUT_WR)


def test_the_secret_is_not_on_the_wire_and_old_lines_open_nothing():
  """What a sniffer recorded holds no secret, and played again seats nobody."""
  with process_0(SECRET, count=2) as (port, future):
    with Wire(port) as wire:
      (link,) = meeting.meet(f"127.0.0.1:{wire.port}", 2, 1, FACTS, 60.0, SECRET)
      assert_met(future, [link])
  assert b"proof" in wire.seen and b"--config.train.seed" in wire.seen
  assert SECRET not in wire.seen and SECRET.hex().encode() not in wire.seen
  spoken = [line for line in wire.seen.split(b"\n") if b"proof" not in line]
  with process_0(SECRET, count=2) as (port, future):
    with call(port) as stranger:
      stranger.sendall(spoken[0] + b"\n")
      stranger.recv(1 << 12)
      stranger.sendall(spoken[1] + b"\n")
      with contextlib.suppress(ConnectionError):
        assert stranger.recv(1) == b""
    assert_met(future, others(port, SECRET, count=2))


def test_what_is_changed_on_the_way_is_refused():
  """With a secret a relay cannot make the processes believe in another seed."""

  def change(data):
    return data.replace(b'"--config.train.seed": 0', b'"--config.train.seed": 7')

  for shared, error in ((None, DisagreementError), (SECRET, PeerLostError)):
    with process_0(shared, count=2, timeout=3.0) as (port, future):
      with Wire(port, change) as wire:
        with pytest.raises(UserError):
          meeting.meet(f"127.0.0.1:{wire.port}", 2, 1, FACTS, 1.0, shared)
        with pytest.raises(error):
          future.result()


def test_after_the_meeting_lines_are_still_signed():
  """A line that was put into the connection is not taken for the peer's."""
  with process_0(SECRET, count=2) as (port, future):
    (link,) = others(port, SECRET, count=2)
    (ours,) = future.result()
  assert link.send({"done": 1}) and ours.receive() == [{"done": 1}]
  link.socket.sendall(b'{"done": 1}\n')
  with pytest.raises(ValueError, match="not signed"):
    ours.receive()
  link.close()
  ours.close()


def test_the_secret_comes_by_the_environment_or_a_file(monkeypatch, tmp_path):
  """Trimmed; what cannot be used is one line that does not repeat it."""
  monkeypatch.delenv(secret.ENV, raising=False)
  monkeypatch.delenv(secret.FILE_ENV, raising=False)
  assert secret.job_secret() is None
  monkeypatch.setenv(secret.ENV, "short-secret")
  with pytest.raises(UserError, match="MOEJAX_JOB_SECRET has 12 characters") as error:
    secret.job_secret()
  assert "short-secret" not in str(error.value)
  monkeypatch.setenv(secret.ENV, SECRET.decode())
  assert secret.job_secret() == SECRET
  file = tmp_path / "secret"
  monkeypatch.setenv(secret.FILE_ENV, str(file))
  with pytest.raises(UserError, match="exclude each other"):
    secret.job_secret()
  monkeypatch.delenv(secret.ENV)
  with pytest.raises(UserError, match="MOEJAX_JOB_SECRET_FILE=.* cannot be read"):
    secret.job_secret()
  file.write_bytes(SECRET + b"\n")
  assert secret.job_secret() == SECRET


# -------------------------------------------------------------------------- listening


def test_a_numeric_address_of_this_machine_is_the_only_one_that_listens():
  """Loopback is not reachable from outside; neither is the runtime's own port."""
  port = launch_local.free_port()
  for host in ("127.0.0.1", "localhost"):
    with listening.listen(f"{host}:{port}") as server:
      assert server.getsockname()[0] == "127.0.0.1"
    assert listening.bind_address(f"{host}:{port}") == f"127.0.0.1:{port}"


@pytest.mark.parametrize("host", ["a-name.invalid", "203.0.113.1", "0.0.0.0"])
def test_an_address_that_may_mean_another_thing_elsewhere_listens_everywhere(host):
  """A name, an address behind NAT: the others reach process 0 as they did before."""
  port = launch_local.free_port()
  with listening.listen(f"{host}:{port}") as server:
    assert server.getsockname()[0] in ("::", "0.0.0.0")
    call(port).close()
  assert listening.bind_address(f"{host}:{port}") is None


def test_the_variable_of_the_runtime_says_where_to_listen(monkeypatch):
  """Both host and port, and it is then left to the runtime to read it."""
  port = launch_local.free_port()
  monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", f"127.0.0.1:{port}")
  with listening.listen("a-name.invalid:1") as server:
    assert server.getsockname()[:2] == ("127.0.0.1", port)
  assert listening.bind_address("127.0.0.1:1") is None
