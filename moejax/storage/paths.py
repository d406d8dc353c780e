"""A run's directory: on this machine, or a folder of a cloud bucket.

A run's directory is a `pathlib.Path` or, for `gs://BUCKET/RUN`, an `epath.Path` with the
same methods, through which Orbax also writes its checkpoints. A bucket has no rename, no
append and no locks: `files.replacing`, `storage.parts` and `storage.lease` do without
them. A folder of a bucket exists as long as an object in it does.

`pathlib.Path(x)` of a bucket's path silently names a local file, so any path that may be
a run's directory is made by `run_path`.
"""

import contextlib
import importlib.util
import logging
import os
import pathlib
import re
import shutil
from typing import TYPE_CHECKING, Any, NoReturn

from moejax.errors import UserError

if TYPE_CHECKING:
  from etils import epath

  RunPath = pathlib.Path | epath.Path
else:
  # The base class of both; epath itself is imported only for a bucket.
  RunPath = pathlib.PurePath
"""A path in a run's directory."""

_URL = re.compile(r"(gs|s3|az|hf):/|[A-Za-z][A-Za-z0-9+.-]*://")
# Also of a pathlib.Path, which has dropped one slash.
_STORE = re.compile(r"(gs|s3|az|hf):/")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")

# fsspec expands the first four, also where it deletes; the others make no readable name.
_REFUSED = re.compile(r"[*?\[\]#\x00-\x1f\x7f]")


def run_path(given: str | os.PathLike[str], flag: str = "--workdir") -> RunPath:
  """Returns the path of a run's directory, or of something in it.

  Args:
    given: a local path, or gs://BUCKET/RUN.
    flag: the flag that named it, for errors.

  Raises:
    UserError: another scheme, an invalid bucket name, or the extra `gcs` is missing.
  """
  if isinstance(given, pathlib.PurePath):
    return given  # pyright: ignore[reportReturnType]
  text = os.fspath(given)
  if not _URL.match(text):
    return pathlib.Path(text)
  check_url(text, flag)
  _prepare(text, flag)
  from etils import epath

  return epath.Path(text)


def in_bucket(path: Any) -> bool:
  """Returns whether a path, or the text of one, is in a bucket."""
  return os.fspath(path).startswith("gs://")


def is_url(given: Any) -> bool:
  """Returns whether a flag's value names something in a bucket."""
  return isinstance(given, str | os.PathLike) and bool(_STORE.match(os.fspath(given)))


def refuse_url(
  given: str | os.PathLike[str], flag: str = "", *, written: bool = False
) -> NoReturn:
  """Refuses a bucket where only a local path is allowed.

  Args:
    given: the path.
    flag: the flag that named it.
    written: whether it is written, not read, so that there is nothing to copy first.

  Raises:
    UserError: always.
  """
  named = f"{flag}={os.fspath(given)}" if flag else os.fspath(given)
  remedy = "Copy it first, with `gcloud storage cp -r`, or mount the bucket."
  if written:
    remedy = "Give a local directory, or a file in one."
  raise UserError(f"{named}: this must be a path on a disk of this machine. {remedy}")


def split(path: RunPath) -> tuple[str, str]:
  """Returns the names of the bucket and the object."""
  bucket, _, name = os.fspath(path).removeprefix("gs://").partition("/")
  return bucket, name


def resolved(path: str | os.PathLike[str]) -> RunPath:
  """Returns the absolute path; a bucket's path already is."""
  found = run_path(path)
  return found if in_bucket(found) else found.resolve()


def write_bytes(path: RunPath, data: bytes) -> None:
  """Replaces an object of a bucket, in one request unless it is large."""
  import fsspec

  # Not epath's write, which opens an upload session even for a few bytes.
  fsspec.filesystem("gcs").pipe_file(os.fspath(path), data)


def make_directory(path: RunPath) -> None:
  """Creates a directory and its parents; in a bucket, writing an object is enough."""
  if not in_bucket(path):
    path.mkdir(parents=True, exist_ok=True)


def remove_tree(path: RunPath) -> None:
  """Removes a directory and its contents, as far as it can; no error if it is gone."""
  if in_bucket(path):
    with contextlib.suppress(FileNotFoundError):
      path.rmtree()  # pyright: ignore[reportAttributeAccessIssue]
  else:
    shutil.rmtree(path, ignore_errors=True)


def check_url(text: str, flag: str = "--workdir") -> None:
  """Refuses a URL that cannot be a run's folder, without contacting any bucket.

  Raises:
    UserError: another scheme, or a name that a bucket or folder may not have.
  """
  if not text.startswith("gs:"):
    raise UserError(
      f"{flag}={text}: only gs:// buckets are supported. Give gs://BUCKET/RUN or a "
      "directory."
    )
  bucket, _, name = text.removeprefix("gs://").partition("/")
  parts = name.rstrip("/").split("/")
  if not text.startswith("gs://") or not bucket or not name:
    raise UserError(f"{flag}={text} names no folder of a bucket: give gs://BUCKET/RUN.")
  if not _BUCKET.fullmatch(bucket):
    what = "is too short" if len(bucket) < 3 else "is not valid"
    raise UserError(
      f"{flag}={text}: the name {bucket!r} {what}. The name of a bucket has 3 to 222 "
      "characters, which are lowercase letters, digits, -, _ and ., and begins and ends "
      "with a letter or digit."
    )
  if _REFUSED.search(name) or any(part in ("", ".", "..") for part in parts):
    raise UserError(
      f"{flag}={text!r}: the name of a run's folder in a bucket may not have *, ?, [, ], "
      "# or control characters, nor the parts '', '.' and '..'. Choose another."
    )


def _prepare(text: str, flag: str) -> None:
  """Configures how libraries access buckets, before they are imported."""
  if importlib.util.find_spec("gcsfs") is None:
    raise UserError(
      f'{flag}={text} needs the extra gcs: pip install "moejax[gcs]" (in a clone '
      '".[gcs]").'
    )
  # Asks for a bucket's type over gRPC, and hangs for minutes where that is blocked.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  # One way to a bucket, whether TensorFlow is installed or not.
  os.environ.setdefault("EPATH_USE_TF", "false")
  import fsspec.config

  # It logs a traceback for each request that it gives up on, which we report ourselves.
  logger = logging.getLogger("gcsfs")
  if logger.level == logging.NOTSET:
    logger.setLevel(logging.CRITICAL)
  # Other processes of a run write there too.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
