"""The disk cache: entries built once, by one process, atomically.

A prepared dataset, a token cache and a trained tokenizer are directories named
by a hash of everything that went into them. `build_once` builds such a directory
under a temporary name and renames it into place, so that a killed build never
looks finished; the next attempt removes its files.

Processes wait for each other on an advisory lock that the system releases when
its holder dies, even by kill -9: a lock file that merely exists would outlive a
crash and need manual removal.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import logging

from moejax.errors import ConfigError, UserError
from moejax.storage.full import is_full
from moejax.storage.paths import is_url, refuse_url

ENV = "MOEJAX_CACHE"


def cache_root(cache_dir: str) -> Path:
  """Returns the cache directory, created if missing.

  A read-only directory works as long as everything requested is in it.

  Args:
    cache_dir: `config.data.cache_dir`; empty means $MOEJAX_CACHE, else ~/.cache/moejax.

  Raises:
    ConfigError: the directory cannot be created.
  """
  chosen = cache_dir or os.environ.get(ENV, "") or "~/.cache/moejax"
  if is_url(chosen):
    refuse_url(chosen, "--config.data.cache_dir" if cache_dir else ENV, written=True)
  root = Path(chosen).expanduser().absolute()
  try:
    root.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    origin = "" if cache_dir else f" (from {ENV} or the default)"
    raise _not_writable(f"{str(root)!r}{origin}", e) from e
  return root


def _not_writable(where: str, error: OSError) -> ConfigError:
  return ConfigError(
    f"--config.data.cache_dir={where} is not writable ({error.strerror}). Give a"
    f" writable directory with --config.data.cache_dir or {ENV}."
  )


def damaged(directory: Path, error: Exception) -> UserError:
  """Returns the error for a damaged cache entry."""
  why = " ".join(str(error).split())[:200] or type(error).__name__
  return UserError(
    f"{directory}, in the cache, is damaged ({why}). Delete it; it will be made again."
  )


def digest(*parts: Any) -> str:
  """Returns a short hash of `parts` (JSON values), stable across processes."""
  text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
  return hashlib.sha256(text.encode()).hexdigest()[:20]


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
  """Holds an exclusive lock on the file `path`; logs if it has to wait."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
  except OSError as e:
    raise _not_writable(repr(str(path.parent.parent)), e) from e
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      logging.info("Waiting for another process to prepare %s.", what)
      fcntl.flock(file, fcntl.LOCK_EX)
    try:
      yield
    finally:
      fcntl.flock(file, fcntl.LOCK_UN)


def build_once(final: Path, build: Callable[[Path], None], *, what: str) -> Path:
  """Returns the directory `final`, first built by `build(temporary)` if missing.

  Safe with any number of processes and kills: readers see all of it or none.

  Args:
    final: where the result is stored; its name identifies what went into it.
    build: fills an empty directory. Its exceptions pass through.
    what: what is built, for the log.

  Raises:
    ConfigError: the cache cannot be written.
    UserError: the disk is full.
  """
  if final.exists():
    return final
  # The lock files stay: removing one while another process waits on it would let
  # a third process lock a new file of the same name.
  with locked(final.parent / ".locks" / final.name, what):
    if final.exists():
      return final
    for stale in final.parent.glob(f"{final.name}.tmp-*"):
      # We hold the lock, so the process that made this is dead.
      logging.info(
        "Removing an unfinished copy of %s, left by a killed run: %s", what, stale.name
      )
      shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=final.parent))
    try:
      logging.info("Preparing %s (once; kept in %s).", what, final)
      build(temporary)
      temporary.chmod(0o755)
      os.replace(temporary, final)
    except BaseException as e:
      shutil.rmtree(temporary, ignore_errors=True)
      if isinstance(e, Exception) and is_full(e):
        raise UserError(
          f"The disk is full: {what} does not fit below {final.parent}. Make room, or"
          " choose another disk with --config.data.cache_dir."
        ) from e
      raise
  return final
