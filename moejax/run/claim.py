"""Claiming a directory: it is writable, and locked against other processes.

The lock is on the directory itself: no lock file is left behind, and the end of the
process unlocks it, kill -9 included. In a bucket the lock is a lease, which ends some
time after its holder. Nothing here imports jax.
"""

import contextlib
import errno
import fcntl
import os
import tempfile
import time

from absl import logging

from moejax.errors import UserError
from moejax.storage import errors as storage_errors
from moejax.storage import lease
from moejax.storage.paths import RunPath, in_bucket, resolved

LOCK_WAIT_SECONDS = 5.0
"""How long to wait for a lock: workers of a killed run may hold it a moment longer."""

_BUSY = (errno.EWOULDBLOCK, errno.EACCES)

_locks: dict[str, int] = {}
"""Directories this process has locked, with the descriptor that holds each lock."""

_leases: dict[str, lease.Lease] = {}
"""The same for folders of buckets."""


def make_writable(path: RunPath) -> None:
  """Creates the directory, and checks that it is writable by writing to it.

  A bucket is only listed here; `lock` is the first to write to it.

  Raises:
    UserError: it is not a directory, or cannot be written to.
  """
  if in_bucket(path):
    storage_errors.reach(path)
    return
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except (FileExistsError, NotADirectoryError) as e:
    raise UserError(
      f"--workdir={path} is not a directory, or lies below a file. Choose another."
    ) from e
  except OSError as e:
    raise UserError(
      f"--workdir={path} is not writable ({e.strerror}). Choose another, or change "
      "its permissions."
    ) from e


def lock(path: RunPath, holder: str = "run", wait_seconds: float | None = None) -> None:
  """Locks a directory until `unlock` or until this process ends, however it ends.

  Args:
    path: an existing directory; no error if this process has locked it already.
    holder: the kind of process that may hold the lock, for the error.
    wait_seconds: for a lock held by another process; None is `LOCK_WAIT_SECONDS`.

  Raises:
    UserError: another process holds the lock.
  """
  key = str(resolved(path))
  if key in _locks or key in _leases:
    return
  if in_bucket(path):
    _leases[key] = lease.acquire(path, holder)
    return
  descriptor = os.open(path, os.O_RDONLY)
  wait = LOCK_WAIT_SECONDS if wait_seconds is None else wait_seconds
  deadline = time.monotonic() + wait
  while True:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      break
    except OSError as e:
      if e.errno not in _BUSY:
        # Some network file systems lack such locks: better to run without one.
        logging.warning(
          "%s cannot be locked (%s): start only one %s in it.", path, e, holder
        )
        break
      if time.monotonic() > deadline:
        os.close(descriptor)
        raise UserError(
          f"--workdir={path} is in use by another live {holder}. Wait until it ends, "
          "stop it, or choose another --workdir."
        ) from e
      time.sleep(0.1)
  _locks[key] = descriptor


def unlock(path: RunPath | str) -> None:
  """Unlocks the directory for other processes. No error if it was not locked."""
  key = str(resolved(path))
  if held := _leases.pop(key, None):
    held.release()
  descriptor = _locks.pop(key, None)
  if descriptor is not None:
    os.close(descriptor)


def is_held(path: RunPath) -> bool:
  """Returns whether this process has locked the directory."""
  key = str(resolved(path))
  return key in _locks or key in _leases


def was_removed(path: RunPath) -> bool:
  """Returns whether a directory that this process has locked was removed.

  Also True if another was made, or mounted, in its place. In a bucket the lease decides.
  """
  descriptor = _locks.get(str(resolved(path)))
  if descriptor is None:
    return False
  held = os.fstat(descriptor)
  try:
    found = os.stat(path)
  except OSError:
    return True
  return (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino)


def is_locked(path: RunPath) -> bool:
  """Returns whether a live process, this one included, has locked the directory.

  The probe takes a shared lock for an instant; `lock` waits longer than that.
  """
  try:
    descriptor = os.open(path, os.O_RDONLY)
  except OSError:
    return False
  try:
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return False
  except OSError as e:
    return e.errno in _BUSY
  finally:
    with contextlib.suppress(OSError):
      os.close(descriptor)
