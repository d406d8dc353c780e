"""A growing text in a bucket, as numbered objects of bounded size.

An object cannot be appended to, only replaced whole. `metrics.jsonl` of a run in a bucket
is therefore the folder `metrics/`, whose objects 000000.jsonl, 000001.jsonl and so on are
read as one text. Only the newest is ever rewritten, and it is at most `PART_BYTES`, so
the cost of a line does not grow with the run.
"""

import contextlib
import time
from collections.abc import Callable

from absl import logging

from moejax.storage import lease
from moejax.storage.errors import explained, refusal
from moejax.storage.paths import RunPath, write_bytes

PART_BYTES = 1 << 18
"""Size at which a part is full."""

WRITE_SECONDS = 10.0
"""Shortest interval between writes, except by `flush`."""


def folder(path: RunPath) -> RunPath:
  """Returns the folder of parts that replaces a file such as metrics.jsonl."""
  return path.with_suffix("")


def parts(path: RunPath) -> list[RunPath]:
  """Returns the parts of a file, the oldest first."""
  return sorted(
    folder(path).glob("*.jsonl"), key=lambda part: (len(part.name), part.name)
  )


def read_text(path: RunPath) -> str:
  """Returns the joined text of all parts of a file; empty if there are none."""
  return "".join(part.read_text() for part in parts(path))


def cut(path: RunPath, keep: Callable[[str], bool]) -> None:
  """Drops lines from the end of a file of parts, up to the newest that is kept.

  Reads parts from the newest backwards, until one whose lines are all kept. A crash on
  the way leaves a shorter text, without a gap.

  Args:
    path: of the file that the parts replace.
    keep: returns whether a line stays.
  """
  for part in reversed(parts(path)):
    lines = part.read_text().splitlines(keepends=True)
    kept = [line for line in lines if keep(line)]
    if len(kept) == len(lines) and lines:
      return
    if kept:
      write_bytes(part, "".join(kept).encode())
      return
    # A request that is repeated because its answer was lost finds nothing to remove.
    with contextlib.suppress(FileNotFoundError):
      part.unlink()


class PartsFile:
  """Appends lines to a file of parts."""

  def __init__(self, path: RunPath):
    """Continues after the last part."""
    self._path = path
    found = parts(path)
    self._number = int(found[-1].stem) if found else 0
    self._text = found[-1].read_text() if found else ""
    self._safe = len(self._text)
    """Characters of the text that the bucket has."""
    self._changed = False
    self._written = time.monotonic()
    self._warned = False

  def append(self, line: str) -> None:
    """Adds a line that ends in a newline; it is written now, or later with others."""
    if len(self._text) >= PART_BYTES:
      # A full part that could not be written is kept, and grows.
      if self._changed:
        self._try_to_write()
      if not self._changed:
        self._number, self._text, self._safe = self._number + 1, "", 0
    self._text += line
    self._changed = True
    if time.monotonic() - self._written >= WRITE_SECONDS:
      self._try_to_write()

  @property
  def late(self) -> str:
    """Lines that the bucket does not have yet."""
    return self._text[self._safe :]

  def flush(self) -> None:
    """Writes all lines.

    Raises:
      UserError: the bucket refuses.
    """
    if not self._changed:
      return
    with explained(self._path.parent):
      self._write()

  def _try_to_write(self) -> None:
    """Writes, or logs once that it failed; the next write has all lines again."""
    self._written = time.monotonic()
    try:
      self._write()
    except Exception as error:
      reason = refusal(error, self._path)
      if not reason:
        raise
      if not self._warned:
        logging.warning("%s: not written for now: %s", self._path, reason)
        self._warned = True

  def _write(self) -> None:
    # Another run may have written this part since: this process may have been suspended.
    lease.confirm(self._path.parent)
    part = folder(self._path) / f"{self._number:06d}.jsonl"
    write_bytes(part, self._text.encode())
    self._changed, self._written, self._warned = False, time.monotonic(), False
    self._safe = len(self._text)
