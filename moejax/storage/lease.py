"""A run's lock in a bucket: a lease that its holder renews, and that a crash ends.

The lease is one object, RUN/.lease. It is written only if its generation is still the one
last seen, so of several writers only one succeeds. Its holder rewrites it every
`RENEW_SECONDS`. A process that finds a lease not renewed for `LEASE_SECONDS` takes it
over; one that sees it renewed gives up. A holder that ended on this machine is recognised
at once, without the wait.

The age of a lease is the difference of two times of the storage service, so clocks that
differ or jump do no harm. A holder that finds its lease taken over, after a long
suspension, ends its process at once: the run now belongs to another process.

The client is Google's own: its small writes carry the condition in a form that the test
emulator also honours, and its errors are distinguished by type.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from typing import Any

from absl import logging

from moejax.errors import UserError
from moejax.storage.errors import explained
from moejax.storage.paths import RunPath, split

LEASE_SECONDS = 60.0
"""A lease not renewed for this long has expired."""

RENEW_SECONDS = 15.0
"""Interval at which a holder renews its lease."""

_POLL_SECONDS = 2.0
_REQUEST_SECONDS = 15.0
"""Limit for one request with its retries, so that several fit into a lease."""

_FRESH_SECONDS = LEASE_SECONDS / 2
"""Within this time of a renewal nobody can have taken over, however slow a write is."""

_NAME = ".lease"
_CLOCK = ".lease.clock"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Found:
  """The lease as it is stored."""

  generation: int
  """Generation of the object; 0 if there is none."""
  record: dict[str, Any]
  updated: datetime.datetime | None


class Lease:
  """A lease that this process holds, renewed by a thread until `release`."""

  def __init__(self, path: RunPath, record: dict[str, Any], generation: int):
    self._path, self._record, self._generation = path, record, generation
    self._bucket = _bucket(path)
    self._renewed = time.monotonic()
    self._lock = threading.Lock()
    self._end = threading.Event()
    self._thread = threading.Thread(
      target=self._renew_until_end, name="lease", daemon=True
    )
    self._thread.start()
    _held[os.fspath(path)] = self

  def release(self) -> None:
    """Gives up the lease; another process can take it at once."""
    _held.pop(os.fspath(self._path), None)
    self._end.set()
    self._thread.join()
    record = self._record | {"released": True}
    # Not worth an error: if this fails, the lease expires by itself.
    with contextlib.suppress(Exception):
      _write(self._bucket, self._path, record, self._generation)

  def _renew_until_end(self) -> None:
    while not self._end.wait(RENEW_SECONDS):
      try:
        self._renew()
      except Exception as error:
        logging.warning("%s: the lease could not be renewed (%s).", self._path, error)

  def confirm(self) -> None:
    """Renews the lease first if it is not fresh; ends the process if it is lost."""
    if time.monotonic() - self._renewed > _FRESH_SECONDS:
      self._renew()

  def _renew(self) -> None:
    with self._lock:
      before = time.monotonic()
      record = self._record | {"renewals": self._record["renewals"] + 1, "time": _now()}
      generation = _write(self._bucket, self._path, record, self._generation)
      if not generation:
        return self._lost(_read(self._bucket, self._path))
      self._record, self._generation = record, generation
      self._renewed = before

  def _lost(self, found: _Found) -> None:
    if found.generation:
      what = (
        f"was taken over by {_holder(found.record)}: its lease was not renewed here for "
        f"{LEASE_SECONDS:.0f} s. This process ends at once."
      )
    else:
      what = (
        "was removed while its run was training: its lease is gone. The same command "
        "starts again from step 0."
      )
    print(f"error: --workdir={self._path} {what}", file=sys.stderr, flush=True)
    os._exit(UserError.exit_code)


_held: dict[str, Lease] = {}
"""Leases of this process, by the path of the run."""


def confirm(path: RunPath) -> None:
  """Ends this process if its lease of a run is lost; call it before writing there.

  A process that was suspended for long may resume at any point. Does nothing if this
  process holds no lease, and sends nothing while the lease is fresh.

  Args:
    path: of the run.

  Raises:
    Exception: of the client, if the bucket cannot be reached.
  """
  if held := _held.get(os.fspath(path)):
    held.confirm()


def acquire(path: RunPath, holder: str = "run") -> Lease:
  """Takes the lease of a run's folder in a bucket.

  If another process may hold it, waits up to `LEASE_SECONDS` for a sign of life.

  Args:
    path: of the run.
    holder: the kind of process that may hold it, for errors.

  Raises:
    UserError: a live process holds it, or the bucket refuses.
  """
  record = _own_record()
  with explained(path):
    bucket = _bucket(path)
    seen: _Found | None = None
    while True:
      found = _read(bucket, path)
      if seen is not None and found.generation not in (0, seen.generation):
        if not found.record.get("released"):
          raise _in_use(path, found.record, holder, _age(bucket, path, found))
        seen = None
      age = _age(bucket, path, found)
      if age >= LEASE_SECONDS or _is_over(found):
        if generation := _write(bucket, path, record, found.generation):
          return Lease(path, record, generation)
        continue
      if seen is None:
        logging.info(
          "%s: waiting up to %.0f s for a sign of life from %s.",
          *(path, LEASE_SECONDS - age, _holder(found.record)),
        )
        seen = found
      time.sleep(min(_POLL_SECONDS, RENEW_SECONDS / 2))


def _is_over(found: _Found) -> bool:
  """Returns whether nobody holds the lease, whatever its age."""
  record = found.record
  return not found.generation or bool(record.get("released")) or _has_ended(record)


def _age(bucket: Any, path: RunPath, found: _Found) -> float:
  """Returns the seconds since the last renewal, by the clock of the service."""
  if _is_over(found) or found.updated is None:
    return 0.0
  clock = bucket.blob(split(path / _CLOCK)[1])
  clock.upload_from_string(b"", timeout=_REQUEST_SECONDS, retry=_retry())
  return (clock.updated - found.updated).total_seconds()


def _in_use(path: RunPath, record: dict[str, Any], holder: str, age: float) -> UserError:
  return UserError(
    f"--workdir={path} is in use by another live {holder}: {_holder(record)}, which "
    f"renewed its lease {age:.0f} s ago. Wait until it ends, stop it, or choose another "
    "--workdir."
  )


def _bucket(path: RunPath) -> Any:
  # Imported here: takes half a second, and needs the extra gcs.
  from google.cloud import storage

  return storage.Client(project=None).bucket(split(path)[0])


def _retry() -> Any:
  from google.cloud.storage.retry import DEFAULT_RETRY

  return DEFAULT_RETRY.with_timeout(_REQUEST_SECONDS)


def _read(bucket: Any, path: RunPath) -> _Found:
  from google.api_core import exceptions

  blob = bucket.blob(split(path / _NAME)[1])
  for _ in range(10):
    try:
      blob.reload(timeout=_REQUEST_SECONDS, retry=_retry())
      text = blob.download_as_bytes(
        if_generation_match=blob.generation, timeout=_REQUEST_SECONDS, retry=_retry()
      )
    except (exceptions.NotFound, exceptions.PreconditionFailed) as error:
      if isinstance(error, exceptions.NotFound):
        return _Found(generation=0, record={}, updated=None)
      continue  # renewed in between
    return _Found(generation=blob.generation, record=_parsed(text), updated=blob.updated)
  raise UserError(f"--workdir={path}: its lease keeps changing. Try again.")


def _write(bucket: Any, path: RunPath, record: dict[str, Any], generation: int) -> int:
  """Writes the lease if it still has this generation.

  Returns:
    The new generation; 0 if another process has written it.
  """
  from google.api_core import exceptions

  blob = bucket.blob(split(path / _NAME)[1])
  try:
    blob.upload_from_string(
      json.dumps(record),
      content_type="application/json",
      if_generation_match=generation,
      timeout=_REQUEST_SECONDS,
      retry=_retry(),
    )
  except exceptions.PreconditionFailed:
    # A retry of a request whose answer was lost meets its own write.
    found = _read(bucket, path)
    return found.generation if found.record == record else 0
  return int(blob.generation)


def _parsed(text: bytes) -> dict[str, Any]:
  """Returns the record; empty, as if nobody held it, if it is not one of ours."""
  try:
    record = json.loads(text)
  except ValueError:
    return {}
  return record if isinstance(record, dict) else {}


def _own_record() -> dict[str, Any]:
  return {
    "id": uuid.uuid4().hex,
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "process": _process(os.getpid()),
    "machine": _machine(),
    "time": _now(),
    "renewals": 0,
    "released": False,
  }


def _holder(record: dict[str, Any]) -> str:
  host, pid = record.get("host", "an unknown host"), record.get("pid", "unknown")
  return f"process {pid} on {host}"


def _has_ended(record: dict[str, Any]) -> bool:
  """Returns whether the holder ran on this machine and has ended."""
  machine = _machine()
  if not machine or record.get("machine") != machine:
    return False
  return _process(record.get("pid")) != record.get("process")


def _machine() -> str:
  """Returns a text that is equal for processes that see each other; empty if unknown."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # Two containers of one machine do not see each other's processes.
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _process(pid: Any) -> str:
  """Returns when a process began, in ticks since the boot; empty if there is none."""
  try:
    fields = pathlib.Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
  except (OSError, ValueError, TypeError):
    return ""
  # A killed process whose parent has not waited for it is a zombie.
  return "" if fields[0] == "Z" else fields[19]


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
