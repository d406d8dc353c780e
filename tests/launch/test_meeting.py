"""Processes before they start: who is there, who differs, who never came."""

import concurrent.futures
import socket
import threading
import time

import jax
import pytest

from moejax.cli import launch_local
from moejax.config import Config
from moejax.errors import DisagreementError, PeerLostError, UserError
from moejax.launch import agreement, distributed, listening, meeting
from moejax.run import provenance

CONFIG = {"--config.train.seed": 0, "jax version": "0.10.2"}


# ------------------------------------------------------------------------- agreement


def test_a_difference_names_the_field_the_processes_and_their_values():
  """Who is in the majority can be seen; what all share is not mentioned."""
  facts = {i: CONFIG | {"--config.train.seed": int(i == 2)} for i in range(5)}
  text = agreement.disagreement(facts)
  assert "--config.train.seed is 0 on processes 0-1, 3-4 and 1 on process 2" in text
  assert "jax" not in text
  assert not agreement.disagreement(dict.fromkeys(range(5), CONFIG))


def test_many_differences_are_counted_not_listed():
  """Two checkouts may differ in a hundred files: eight are named."""
  facts = {i: {f"SHA-256 of file_{n}": i for n in range(100)} for i in range(2)}
  text = agreement.disagreement(facts)
  assert "file_7 " in text and "file_8 " not in text and "and 92 more" in text


def test_a_run_states_its_config_revision_versions_and_files():
  """Two dirty checkouts of one commit differ in a file's digest; cache_dir may differ."""
  facts = provenance.facts(Config())
  assert facts["--config.train.seed"] == 0
  assert {"code revision", "version of jax", "SHA-256 of moejax/config/schema.py"} <= set(
    facts
  )
  assert "--config.data.cache_dir" not in facts


# ----------------------------------------------------------------------------- rank


def test_a_single_process_opens_nothing_and_starts_nothing(monkeypatch):
  """Without flags, variables or a launcher: no thread, no call of the runtime."""
  monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
  monkeypatch.setattr(distributed, "launcher", lambda: None)
  before = threading.enumerate()
  with distributed.joined(facts=CONFIG):
    assert threading.enumerate() == before
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
  ("rank", "words"),
  [
    (("", 2, None), "--coordinator_address --process_id: missing or not a number"),
    (("a:1", -2, 0), "--num_processes: missing or not a number"),
    (("a:1", 2, 2), "--process_id=2 is not below --num_processes=2"),
    (("a:1", 0, 0), "--process_id=0 is not below --num_processes=0"),
    (("a", 2, 0), "--coordinator_address=a: not of the form HOST:PORT"),
  ],
)
def test_half_a_rank_is_refused(rank, words):
  """Code 2 with the flag, before anything is tried."""
  with pytest.raises(UserError, match=words):
    distributed.find_rank(*rank)


# --------------------------------------------------------------------------- meeting


def meet(members, timeout: float = 20.0, port: int | None = None) -> list:
  """What each (count, index, facts) gets from the meeting: links or the error."""
  address = f"127.0.0.1:{port or launch_local.free_port()}"

  def one(member):
    try:
      count, index, facts = member
      return meeting.meet(address, count, index, facts, timeout)
    except UserError as error:
      return error

  with concurrent.futures.ThreadPoolExecutor(len(members)) as pool:
    results = list(pool.map(one, members))
  for links in results:
    for link in [] if isinstance(links, UserError) else links:
      link.close()
  return results


def test_everyone_meets_everyone():
  """Process 0 has a link to each other, in order; the others have one to process 0."""
  results = meet([(3, i, CONFIG) for i in (2, 0, 1)])
  assert [[link.index for link in links] for links in results] == [[0], [1, 2], [0]]


def test_the_port_is_free_again_while_the_links_are_open():
  """The runtime listens at the same port next, and must be able to."""
  port = launch_local.free_port()
  for _ in range(2):
    results = meet([(2, i, CONFIG) for i in range(2)], port=port)
    assert not any(isinstance(r, UserError) for r in results)


@pytest.mark.parametrize(
  ("members", "words"),
  [
    (
      [(2, 0, CONFIG), (2, 1, CONFIG | {"--config.train.seed": 1})],
      "--config.train.seed is 0 on process 0 and 1 on process 1",
    ),
    (
      [(2, 0, {"code revision": "a"}), (2, 1, {"code revision": "b"})],
      'code revision is "a" on process 0 and "b" on process 1',
    ),
    ([(3, 0, {}), (2, 1, {})], "--num_processes is 3 on process 0 and 2 on process 1"),
    (
      [(2, 0, {}), (3, 1, {}), (3, 2, {})],
      "--num_processes is 2 on process 0 and 3 on process",
    ),
    ([(3, 0, {}), (3, 1, {}), (3, 1, {})], "--process_id=1 was given to several"),
  ],
)
def test_a_disagreement_is_the_same_error_on_every_process(members, words):
  """Code 4, the difference named; also about their number, which jax never notices."""
  began = time.monotonic()
  errors = meet(members)
  told = [e for e in errors if isinstance(e, DisagreementError)]
  # Who comes after process 0 knew enough finds nobody; those at the meeting agree.
  assert len(told) >= 2 and len({str(e) for e in told}) == 1
  assert words in str(told[0]) and told[0].exit_code == 4
  assert isinstance(errors[0], DisagreementError)
  assert time.monotonic() - began < 60


def test_who_never_came_is_named_on_all_that_did():
  """Code 3 after the stated time, not a wait for ever."""
  errors = meet([(4, 0, CONFIG), (4, 2, CONFIG)], timeout=1.5)
  assert all(isinstance(e, PeerLostError) for e in errors)
  assert str(errors[0]) == str(errors[1])
  assert "processes 1, 3 of 4 did not connect within 1.5 s" in str(errors[0])


def test_a_coordinator_that_is_not_there_is_given_up():
  """Code 3 after the stated time, with the address and the last reason."""
  began = time.monotonic()
  (error,) = meet([(2, 1, CONFIG)], timeout=1.0)
  assert isinstance(error, PeerLostError) and error.exit_code == 3
  assert "did not answer within 1 s (--join_timeout); last: Connection ref" in str(error)
  assert time.monotonic() - began < 10


def test_strangers_at_the_port_are_ignored():
  """A port scan, an HTTP client and a connection that stays mute do no harm."""
  port = launch_local.free_port()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(meet, [(2, 0, CONFIG)], port=port)
    mute = None
    while mute is None:
      try:
        mute = socket.create_connection(("127.0.0.1", port))
      except OSError:
        time.sleep(0.05)
    for junk in (b"GET / HTTP/1.1\r\n\r\n", b'["moejax"]\n', b'{"moejax": "x"}\n', b""):
      with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(junk)
    (second,) = meeting.meet(f"127.0.0.1:{port}", 2, 1, CONFIG, 20.0)
    (links,) = first.result()
    second.close()
    mute.close()
  assert [x.index for x in links] == [1] and second.index == 0


@pytest.mark.parametrize("address", ["here", "here:", ":1234", "here:http", "here:70000"])
def test_an_address_that_is_none_is_refused(address):
  """Code 2, with the flag and its form."""
  with pytest.raises(UserError, match=f"--coordinator_address={address}: .*HOST:PORT"):
    meeting.meet(address, 2, 1, {}, 1.0)


def test_a_port_that_is_taken_is_refused(monkeypatch):
  """Two processes with --process_id=0 on one machine, for example."""
  monkeypatch.setattr(listening, "_BIND_SECONDS", 0.5)
  with socket.create_server(("", 0)) as taken:
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(UserError, match="cannot listen at port"):
      meeting.meet(address, 2, 0, {}, 1.0)
