"""Local text: which files, and which documents in them.

A corpus is a folder (read recursively), or one file. Any file is one document,
whatever its suffix; a .jsonl file is one document per line, from its text field.
Each may be compressed as .gz, .xz or .zst. Hidden files and folders and
__pycache__ are not looked at.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import zstandard

from moejax.data.types import EMPTY, Document, Skipped
from moejax.errors import ConfigError

COMPRESSIONS = (".gz", ".xz", ".zst")

_BROKEN = (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """A list of files and how to read them."""

  root: Path
  files: tuple[PurePath, ...]
  """Relative to root, sorted by their POSIX spelling."""
  domain_of: Callable[[PurePath], str]
  text_field: str = "text"

  def read(self, file: PurePath) -> Iterator[Document | Skipped]:
    """The documents of one file; a broken file ends in one `Skipped`."""
    name, domain = file.as_posix(), self.domain_of(file)
    try:
      with open_text(self.root / file) as stream:
        if _plain_name(file).endswith(".jsonl"):
          yield from _read_lines(stream, name, domain, self.text_field)
        else:
          yield check_text(stream.read(), name, domain)
    except _BROKEN as e:
      yield Skipped(name, f"cannot be read: {e or type(e).__name__}")

  def documents(self) -> Iterator[Document | Skipped]:
    """Every document of every file, duplicates included; always the same order."""
    for file in self.files:
      yield from self.read(file)

  def fingerprint(self) -> str:
    """A hash of all names and bytes, compressed as they lie there."""
    total = hashlib.sha256()
    for file in self.files:
      total.update(f"{file.as_posix()}\0{self.domain_of(file)}\0".encode())
      try:
        with open(self.root / file, "rb") as stream:
          total.update(hashlib.file_digest(stream, "sha256").digest())
      except OSError as e:
        total.update(f"unreadable {e.errno}".encode())
    return total.hexdigest()[:20]


def local_corpus(path: str, text_field: str) -> Corpus:
  """The corpus at `config.data.path`.

  The domain is the top-level folder; of a .jsonl file at the top its stem; other
  files at the top share the name of the folder that was given.

  Raises:
    ConfigError: nothing is there, it cannot be read, or it holds no file.
  """
  if not path:
    raise ConfigError(
      "--config.data.name=text needs --config.data.path=DIR: a folder of text, or a file."
    )
  root = Path(path).expanduser().absolute()
  if not root.exists():
    raise ConfigError(f"--config.data.path={path!r} does not exist. Check the spelling.")
  if not os.access(root, os.R_OK | (os.X_OK if root.is_dir() else 0)):
    raise ConfigError(
      f"--config.data.path={path!r} cannot be read. Check its permissions."
    )
  if root.is_file():
    stem = _plain_name(root).split(".")[0]
    return Corpus(
      root=root.parent,
      files=(PurePath(root.name),),
      domain_of=lambda _: stem,
      text_field=text_field,
    )

  def domain_of(file: PurePath) -> str:
    if len(file.parts) > 1:
      return file.parts[0]
    plain = _plain_name(file)
    return plain.removesuffix(".jsonl") if plain.endswith(".jsonl") else root.name

  files = find_files(root)
  if not files:
    raise ConfigError(
      f"--config.data.path={path!r} holds no files (hidden ones do not count)."
    )
  return Corpus(root=root, files=files, domain_of=domain_of, text_field=text_field)


def find_files(root: Path, skip: frozenset[str] = frozenset()) -> tuple[PurePath, ...]:
  """Files below `root`, without hidden ones and without folders named in `skip`."""
  found = []
  skip |= {"__pycache__"}
  for folder, folders, names in os.walk(root):
    folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
    for name in names:
      path = Path(folder, name)
      # A pipe or a socket would block for ever; a dangling link is worth a word.
      if not name.startswith(".") and (path.is_file() or path.is_symlink()):
        found.append(path.relative_to(root))
  return tuple(PurePath(f) for f in sorted(found, key=lambda f: f.as_posix()))


def _plain_name(file: PurePath) -> str:
  """The name without its compression suffix."""
  return file.name[: -len(file.suffix)] if file.suffix in COMPRESSIONS else file.name


class _ZstdFile(io.RawIOBase):
  """Decompresses all frames of a file.

  zstandard's own reader ends silently where a file was cut off; this one raises.
  """

  def __init__(self, raw: io.BufferedIOBase):
    self._raw = raw
    self._frame: Any = None
    self._ready = b""

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._ready:
      data = self._frame.unused_data if self._frame and self._frame.eof else b""
      data = data or self._raw.read(1 << 18)
      if not data:
        if self._frame and not self._frame.eof:
          raise EOFError("zstandard frame ends early")
        return 0
      if self._frame is None or self._frame.eof:
        self._frame = zstandard.ZstdDecompressor().decompressobj()
      self._ready = self._frame.decompress(data)
    size = min(len(buffer), len(self._ready))
    buffer[:size], self._ready = self._ready[:size], self._ready[size:]
    return size


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[io.BufferedIOBase]:
  """Opens a file for reading bytes, decompressed according to its suffix."""
  with open(path, "rb") as raw:
    match path.suffix:
      case ".gz":
        yield gzip.GzipFile(fileobj=raw)
      case ".xz":
        yield lzma.LZMAFile(raw)  # noqa: SIM115 (owns nothing that raw does not)
      case ".zst":
        yield io.BufferedReader(_ZstdFile(raw))
      case _:
        yield raw


def check_text(text: bytes, name: str, domain: str) -> Document | Skipped:
  """A document, unless it is empty, binary or not UTF-8."""
  if not text:
    return Skipped(name, EMPTY)
  if b"\0" in text:
    return Skipped(name, "binary (holds a zero byte)")
  try:
    text.decode("utf-8")
  except UnicodeDecodeError as e:
    return Skipped(name, f"not UTF-8 (byte {e.start})")
  return Document(text, name, domain)


def _read_lines(
  stream: io.BufferedIOBase, name: str, domain: str, text_field: str
) -> Iterator[Document | Skipped]:
  for number, line in enumerate(stream, start=1):
    if not line.strip():
      continue
    where = f"{name}:{number}"
    try:
      record: Any = json.loads(line)
    except ValueError as e:
      yield Skipped(where, f"not JSON: {e}")
      continue
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
      keys = ", ".join(sorted(record)) if isinstance(record, dict) else "no fields"
      yield Skipped(where, f"no text field {text_field!r} (it has: {keys})")
      continue
    # A lone surrogate is legal JSON but no text.
    yield check_text(text.encode("utf-8", "surrogatepass"), where, domain)
