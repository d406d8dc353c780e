"""Safe file access: reads never hang on untrusted files, and writes are atomic.

A folder of text or a run's directory may come from anywhere. It can contain a pipe, on
which opening blocks forever, an endless file, JSON nested deeper than Python's stack, or
a link that points out of the folder. In a bucket, an object is whole or is not there.
"""

import contextlib
import io
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moejax.storage.paths import RunPath, in_bucket, run_path, write_bytes

_MAX_JSON_BYTES = 1 << 28
"""Far more than any of our files: checkpoint metadata has some 200 bytes per array."""

_MAX_JSON_DEPTH = 32

_KINDS = {
  stat.S_IFDIR: "a folder",
  stat.S_IFIFO: "a pipe",
  stat.S_IFSOCK: "a socket",
  stat.S_IFCHR: "a device",
  stat.S_IFBLK: "a device",
}


def kind(mode: int) -> str:
  """Returns the file type of an `st_mode` in words; empty for a regular file."""
  return _KINDS.get(stat.S_IFMT(mode), "")


def open_regular(path: RunPath | str) -> io.BufferedReader:
  """Opens a regular file, or a link to one, for reading bytes; never blocks.

  Raises:
    OSError: as `open`, and for anything but a regular file.
  """
  if in_bucket(path):
    return io.BufferedReader(io.BytesIO(run_path(path).read_bytes()))
  _refuse(os.stat(path).st_mode)
  # Non-blocking, in case it has been replaced by a pipe since.
  descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  try:
    _refuse(os.fstat(descriptor).st_mode)
    return os.fdopen(descriptor, "rb")
  except BaseException:
    os.close(descriptor)
    raise


def _refuse(mode: int) -> None:
  if what := kind(mode):
    raise OSError(f"it is {what}, not a file")


def parse_json(text: str | bytes, max_depth: int | None = None) -> Any:
  """Parses JSON as `json.loads`; ValueError also for JSON nested too deeply.

  Args:
    text: JSON.
    max_depth: nesting of lists and dicts; None is the limit of Python's stack, which is
      deeper than `copy.deepcopy` and similar functions can handle.
  """
  try:
    value = json.loads(text)
  except RecursionError:
    value, max_depth = [], -1
  if max_depth is not None and _is_deeper(value, max_depth):
    raise ValueError("it nests too deep")
  return value


def _is_deeper(value: Any, depth: int) -> bool:
  level = [value]
  while level:
    nodes = [node for node in level if isinstance(node, dict | list)]
    if nodes and depth <= 0:
      return True
    depth -= 1
    level = [x for n in nodes for x in (n.values() if isinstance(n, dict) else n)]
  return False


def read_json(path: RunPath | str, limit: int = _MAX_JSON_BYTES) -> Any:
  """Returns the content of a JSON file.

  Raises:
    OSError: as `open_regular`.
    ValueError: not JSON, not UTF-8, nested too deeply, or more than `limit` bytes.
  """
  with open_regular(path) as file:
    data = file.read(limit + 1)
  if len(data) > limit:
    raise ValueError(f"it has more than {limit >> 20} MiB")
  return parse_json(data.decode("utf-8"), _MAX_JSON_DEPTH)


@contextlib.contextmanager
def replacing(path: RunPath | str) -> Iterator[Path]:
  """Replaces a file atomically: readers see the old or the new one, even after a crash.

  A link is replaced, not followed.

  Args:
    path: of the file, in an existing directory or a bucket.

  Yields:
    A temporary file in the same directory, renamed to `path` unless the body raises. For
    a bucket, it is on this machine and is uploaded.
  """
  if in_bucket(path):
    path = run_path(path)
    with tempfile.TemporaryDirectory() as directory:
      yield (temporary := Path(directory) / "file")
      write_bytes(path, temporary.read_bytes())
    return
  path = Path(path)
  descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
  os.close(descriptor)
  temporary = Path(name)
  try:
    yield temporary
    with temporary.open("rb") as file:
      os.fsync(file.fileno())
    # mkstemp makes private files; these get the usual permissions.
    temporary.chmod(0o666 & ~_umask())
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write_text(path: RunPath | str, text: str) -> None:
  """Replaces a text file; see `replacing`."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(path: RunPath | str, value: Any) -> None:
  """Replaces a file by sorted JSON; see `replacing`."""
  write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
