"""The directory of emergency checkpoints, and checks of the one that a user asks for.

Nothing here imports jax, which takes seconds, so that a mistake is found before.
"""

import dataclasses
import hashlib
import os
import re
from pathlib import Path

from moejax.errors import UserError
from moejax.storage.paths import RunPath, in_bucket, is_url, resolved

DEFAULT_EVERY = 10
"""Default number of steps between emergency checkpoints."""

_FLAG = "--emergency_local_dir"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
  """Where and how often a user wants emergency checkpoints."""

  directory: str
  every: int = DEFAULT_EVERY
  """Steps between saves, at least 1."""


def check(directory: str, workdir: RunPath) -> None:
  """Refuses a directory that cannot hold emergency checkpoints, before anything else.

  Raises:
    UserError: it is in a bucket, is --workdir or inside it, or cannot be written to.
  """
  if is_url(directory) or "://" in directory:
    raise UserError(
      f"{_FLAG}={directory} is not on a disk of this machine, where saving is fast. Give "
      "a local directory; --workdir may be in a bucket."
    )
  path = Path(directory).resolve()
  if not in_bucket(workdir) and path.is_relative_to(os.fspath(resolved(workdir))):
    raise UserError(
      f"{_FLAG}={directory} is --workdir={workdir} or lies in it. Give a separate "
      "directory, on a disk of this machine."
    )
  make(path, directory)


def of_run(directory: str, workdir: RunPath) -> Path:
  """Returns the part of a directory that belongs to the run in `workdir`."""
  where = os.fspath(resolved(workdir))
  name = re.sub(r"[^\w.-]", "_", Path(where).name)[:64]
  suffix = hashlib.sha256(where.encode()).hexdigest()[:8]
  return Path(directory).resolve() / f"{name}-{suffix}"


def make_own(path: Path, directory: str) -> None:
  """Makes a directory like `make`, and refuses another user's.

  Raises:
    UserError: as for `make`, or another user could put checkpoints there.
  """
  make(path, directory)
  if path.stat().st_uid != os.geteuid():
    raise UserError(
      f"{_FLAG}={directory}: {path} belongs to another user. Give a directory of "
      "your own."
    )


def make(path: Path, directory: str) -> None:
  """Makes a directory, and checks that this user can write to it.

  Args:
    path: the directory to make, inside `directory`.
    directory: the value of the flag, for the error.

  Raises:
    UserError: it cannot be made.
  """
  try:
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    probe = path / f".probe.{os.getpid()}"
    probe.mkdir()
    probe.rmdir()
  except OSError as error:
    raise UserError(
      f"{_FLAG}={directory}: {path} cannot be written to ({error.strerror}). Give "
      "another directory on a disk of this machine, or leave the flag out."
    ) from error
