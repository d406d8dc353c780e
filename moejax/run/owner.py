"""Ownership of a run: a mark that only the user who trained it can make.

A run's config names paths: the text it read and the cache it wrote. Evaluation reuses
them, which is right for the user's own run. A directory from elsewhere could name any
path on this machine. So training marks each checkpoint with an HMAC of those paths,
under a key that never leaves the user's configuration directory. File ownership proves
nothing: unpacked files belong to the user who unpacks the archive.
"""

import contextlib
import copy
import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Collection
from pathlib import Path

from absl import logging

from moejax.config import Config
from moejax.errors import UserError
from moejax.storage.paths import RunPath

_KEY_BYTES = 32


def key_file() -> Path:
  """Returns the path of the key: `$XDG_CONFIG_HOME/moejax/key`, or below ~/.config."""
  home = os.environ.get("XDG_CONFIG_HOME", "") or "~/.config"
  return Path(home).expanduser() / "moejax" / "key"


def mark(config: Config) -> str | None:
  """Returns the mark of a run's paths; None if no key can be stored."""
  try:
    key = _read_key() or _make_key()
  except (OSError, RuntimeError):  # RuntimeError: a user without a home
    return None
  return _mark(key, config)


def is_own(config: Config, found: object) -> bool:
  """Returns whether a checkpoint's mark shows that this user trained with its paths."""
  try:
    key = _read_key()
  except (OSError, RuntimeError):
    return False
  return key is not None and isinstance(found, str) and _equal(found, _mark(key, config))


def own_paths(
  config: Config, found: object, given: Collection[str], workdir: RunPath | str
) -> Config:
  """Returns the config of a run, without paths that this user did not choose.

  Args:
    config: of a checkpoint.
    found: the checkpoint's mark.
    given: fields set on the command line, which the user did choose.
    workdir: the run's directory, for messages.

  Returns:
    `config` for the user's own run; otherwise one that uses the user's own cache.

  Raises:
    UserError: the path of the text is named only by the run.
  """
  data = config.data
  if not (data.path or data.cache_dir) or is_own(config, found):
    return config
  if data.path and "data.path" not in given:
    raise UserError(
      f"--workdir={workdir} was not trained by this user (it is not signed with "
      f"{key_file()}), and its config reads --config.data.path={data.path!r}. If that is "
      f"the intended text, set --config.data.path={data.path} explicitly; otherwise give "
      "another path."
    )
  if data.cache_dir and "data.cache_dir" not in given:
    logging.info(
      "%s was trained elsewhere: its --config.data.cache_dir=%r is not used.",
      workdir,
      data.cache_dir,
    )
    config = copy.deepcopy(config)
    config.data.cache_dir = ""
  return config


def _mark(key: bytes, config: Config) -> str:
  paths = json.dumps([config.data.path, config.data.cache_dir])
  return hmac.new(key, f"moejax paths\0{paths}".encode(), hashlib.sha256).hexdigest()


def _equal(a: str, b: str) -> bool:
  return hmac.compare_digest(a.encode("utf-8", "replace"), b.encode())


def _read_key() -> bytes | None:
  with contextlib.suppress(FileNotFoundError, NotADirectoryError):
    key = key_file().read_bytes()
    return key if len(key) == _KEY_BYTES else None
  return None


def _make_key() -> bytes:
  """Creates the key, or returns the one that another process created meanwhile."""
  path = key_file()
  path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
  handle, name = tempfile.mkstemp(prefix=".key-", dir=path.parent)
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(secrets.token_bytes(_KEY_BYTES))
    if _read_key() is None and path.exists():
      os.replace(name, path)  # not a valid key, such as an empty file from a full disk
    else:
      with contextlib.suppress(FileExistsError):
        os.link(name, path)
  finally:
    Path(name).unlink(missing_ok=True)
  return path.read_bytes()
