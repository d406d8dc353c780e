"""The lock of a run in a bucket: one holder, and none that is dead."""

import json
import threading
import time

import pytest

from moejax.errors import UserError
from moejax.run import claim, writers
from moejax.storage import lease


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """A lease that no test waits for, renewed often."""
  monkeypatch.setattr(lease, "LEASE_SECONDS", 120.0)
  monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)


def stored(folder) -> dict:
  return json.loads((folder / ".lease").read_text())


def elsewhere(monkeypatch):
  """Makes leases of this process look like those of another machine."""
  monkeypatch.setattr(lease, "_machine", lambda: "")


def test_a_live_run_refuses_a_second_one(folder, monkeypatch):
  """One line names its holder; released, the lease is free at once."""
  elsewhere(monkeypatch)
  held = lease.acquire(folder)
  with pytest.raises(UserError, match=r"another live run: process \d+ on \S+, which"):
    lease.acquire(folder)
  held.release()
  start = time.monotonic()
  lease.acquire(folder).release()
  assert time.monotonic() - start < lease.LEASE_SECONDS


def test_a_lease_that_is_not_renewed_is_taken_over(folder, monkeypatch):
  """Not before its time, and no further second is waited where it is long over."""
  elsewhere(monkeypatch)
  monkeypatch.setattr(lease, "RENEW_SECONDS", 3600.0)
  monkeypatch.setattr(lease, "LEASE_SECONDS", 3.0)
  start = time.monotonic()
  dead = lease.acquire(folder)
  first = stored(folder)["id"]
  held = lease.acquire(folder)
  assert stored(folder)["id"] not in ("", first)
  assert time.monotonic() - start >= 3.0
  dead._end.set()
  held.release()


def test_a_holder_that_ended_on_this_machine_is_known_at_once(folder, monkeypatch):
  """A killed run starts again without a wait; a live one is not taken for dead."""
  held = lease.acquire(folder)
  held._end.set()
  record = stored(folder) | {"process": "0"}
  (folder / ".lease").write_text(json.dumps(record))
  lease.acquire(folder).release()
  assert not lease._has_ended(stored(folder))


def test_of_many_at_once_one_gets_the_lease(folder, monkeypatch):
  """The condition on the generation decides, also between threads."""
  elsewhere(monkeypatch)
  won, lost = [], []

  def take():
    try:
      won.append(lease.acquire(folder))
    except UserError:
      lost.append(1)

  threads = [threading.Thread(target=take) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(won) == 1 and len(lost) == 3
  won[0].release()


@pytest.mark.parametrize("removed", [False, True])
def test_a_holder_that_lost_its_lease_ends_at_once(folder, monkeypatch, capsys, removed):
  """A process that was suspended must not write into another's run, nor one whose run
  was removed go on in an empty folder."""
  ended = threading.Event()
  codes = []

  def end(code):
    codes.append(code)
    held._end.set()
    ended.set()

  monkeypatch.setattr(lease.os, "_exit", end)
  held = lease.acquire(folder)
  if removed:
    (folder / ".lease").unlink()
  else:
    (folder / ".lease").write_text(json.dumps({"host": "other", "pid": 7}))
  assert ended.wait(60)
  assert codes == [2]
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  words = "was removed while" if removed else "taken over by process 7 on other"
  assert words in error


def test_an_answer_that_was_lost_is_no_other_holder(folder):
  """A retried write finds its own record, and has succeeded."""
  bucket = lease._bucket(folder)
  record = lease._own_record()
  generation = lease._write(bucket, folder, record, 0)
  assert generation
  assert lease._write(bucket, folder, record, 0) == generation
  assert lease._write(bucket, folder, record | {"id": "x"}, 0) == 0


def test_claims_lock_and_unlock_a_folder(folder, monkeypatch):
  """`run.claim` has one interface for disks and buckets, and is idempotent."""
  claim.make_writable(folder)
  claim.lock(folder)
  claim.lock(folder)
  assert not stored(folder)["released"]
  claim.unlock(folder)
  assert stored(folder)["released"]
  claim.unlock(folder)


def test_a_process_that_wakes_up_writes_no_metrics_into_another_s_run(
  folder, monkeypatch
):
  """Before its thread has looked: the line asks for the lease first, if it is stale."""
  elsewhere(monkeypatch)
  monkeypatch.setattr(lease, "RENEW_SECONDS", 3600.0)

  def end(code):
    raise SystemExit(code)

  monkeypatch.setattr(lease.os, "_exit", end)
  held = lease.acquire(folder)
  writer = writers.BucketJsonlWriter(folder, resume_step=0)
  writer.write(1, {"loss": 1.0})
  writer.flush()
  (folder / ".lease").write_text(json.dumps(stored(folder) | {"id": "another"}))
  (folder / "metrics" / "000000.jsonl").write_text("of another\n")
  writer.write(2, {"loss": 1.0})
  held._renewed -= lease.LEASE_SECONDS
  with pytest.raises(SystemExit):
    writer.flush()
  assert (folder / "metrics" / "000000.jsonl").read_text() == "of another\n"
  held.release()
