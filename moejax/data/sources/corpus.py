"""Local text: which files, and which documents in them.

A corpus is a folder (read recursively), or one file. Any file is one document,
whatever its suffix; a .jsonl file is one document per line, from its text field.
Each may be compressed as .gz, .xz or .zst. Hidden files and folders and
__pycache__ are not looked at.

A link to a file is read, wherever it leads. What is neither a file nor a folder that can
be read (a pipe, a socket, a device, a link to one or to a folder) is left out and named.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import zstandard
from absl import logging

from moejax import files as files_lib
from moejax.data.types import EMPTY, Document, Skipped
from moejax.errors import ConfigError

COMPRESSIONS = (".gz", ".xz", ".zst")

_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)

_MAX_DOCUMENT_BYTES = 1 << 30
"""More than the records of a prepared dataset hold, and than a small compressed file may
cost in memory."""
_TOO_LONG = "longer than 1 GiB: cut it into several documents"
_ZSTD_BYTES = 1 << 13
"""Read at once: at the greatest compression there is, 8 KiB become 256 MiB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """A list of files and how to read them."""

  root: Path
  files: tuple[PurePath, ...]
  """Relative to root, sorted by their POSIX spelling."""
  domain_of: Callable[[PurePath], str]
  text_field: str = "text"
  left_out: tuple[Skipped, ...] = ()
  """What lies among the files and is none. Not part of the fingerprint."""

  def read(self, file: PurePath) -> Iterator[Document | Skipped]:
    """The documents of one file; a broken file ends in one `Skipped`."""
    name, domain = readable(file.as_posix()), readable(self.domain_of(file))
    try:
      with open_text(self.root / file) as stream:
        if _plain_name(file).endswith(".jsonl"):
          yield from _read_lines(stream, name, domain, self.text_field)
        else:
          text = stream.read(_MAX_DOCUMENT_BYTES + 1)
          if len(text) > _MAX_DOCUMENT_BYTES:
            yield Skipped(name, _TOO_LONG)
          else:
            yield check_text(text, name, domain)
    except _BROKEN as e:
      yield Skipped(name, f"cannot be read: {e or type(e).__name__}")

  def documents(self) -> Iterator[Document | Skipped]:
    """Every document of every file, duplicates included; always the same order."""
    yield from self.left_out
    for file in self.files:
      yield from self.read(file)

  def fingerprint(self) -> str:
    """A hash of all names and bytes, compressed as they lie there."""
    total = hashlib.sha256()
    for file in self.files:
      names = f"{file.as_posix()}\0{self.domain_of(file)}\0"
      # File names are bytes, and need not be UTF-8.
      total.update(names.encode("utf-8", "surrogateescape"))
      try:
        with files_lib.open_regular(self.root / file) as stream:
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

  if not root.is_dir():
    what = files_lib.kind(root.stat().st_mode)
    raise ConfigError(
      f"--config.data.path={path!r} is {what}. Give a folder of text, or a file."
    )
  files, left_out = find_files(root)
  if not files:
    more = f": {left_out[0].document} {left_out[0].reason}" if left_out else ""
    raise ConfigError(
      f"--config.data.path={path!r} holds no files (hidden ones do not count){more}."
    )
  _tell_of_links(root, files, path)
  return Corpus(
    root=root,
    files=files,
    domain_of=domain_of,
    text_field=text_field,
    left_out=left_out,
  )


def find_files(
  root: Path, skip: frozenset[str] = frozenset()
) -> tuple[tuple[PurePath, ...], tuple[Skipped, ...]]:
  """Files below `root`, without hidden ones and without folders named in `skip`.

  Returns:
    The files, links to files and dangling links, and what is none of these.
  """
  found: list[Path] = []
  left_out: list[Skipped] = []
  skip |= {"__pycache__"}

  def leave_out(path: str | Path, reason: str) -> None:
    left_out.append(Skipped(readable(Path(path).relative_to(root).as_posix()), reason))

  def unreadable(error: OSError) -> None:
    leave_out(error.filename, f"cannot be read: {error.strerror}")

  for folder, folders, names in os.walk(root, onerror=unreadable):
    folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
    for path in [Path(folder, f) for f in folders if os.path.islink(Path(folder, f))]:
      leave_out(path, "is a link to a folder, which is not followed")
    for path in [Path(folder, name) for name in names if not name.startswith(".")]:
      try:
        what = files_lib.kind(path.stat().st_mode)
      except OSError:
        what = ""  # a dangling link, named when it is read
      if what:
        leave_out(path, f"is {'a link to ' * path.is_symlink()}{what}, not a file")
      else:
        found.append(path.relative_to(root))
  files = tuple(PurePath(f) for f in sorted(found, key=lambda f: f.as_posix()))
  return files, tuple(sorted(left_out, key=lambda item: item.document))


def _tell_of_links(root: Path, files: tuple[PurePath, ...], path: str) -> None:
  """Names where text comes from that does not lie in the folder that was given."""
  # Not Path.resolve, for which a link to itself is an error.
  home = Path(os.path.realpath(root))
  out: list[tuple[PurePath, Path]] = []
  for file in files:
    if (root / file).is_symlink():
      target = Path(os.path.realpath(root / file))
      if not target.is_relative_to(home):
        out.append((file, target))
  if out:
    file, target = out[0]
    logging.warning(
      "--config.data.path=%r: links that lead out of it are read: %d, such as %s -> %s.",
      path,
      len(out),
      readable(file.as_posix()),
      readable(str(target)),
    )


def readable(name: str) -> str:
  """A file name as text: names may hold any bytes, escape codes among them."""
  text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
  return "".join(c if c.isprintable() else "?" for c in text)


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
      data = data or self._raw.read(_ZSTD_BYTES)
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
  with files_lib.open_regular(path) as raw:
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
  for number, line in enumerate(_lines(stream), start=1):
    where = f"{name}:{number}"
    if line is None:
      yield Skipped(where, _TOO_LONG)
      continue
    if not line.strip():
      continue
    try:
      record: Any = files_lib.parse_json(line)
    except ValueError as e:
      yield Skipped(where, f"not JSON: {e}")
      continue
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
      keys = ", ".join(sorted(record)) if isinstance(record, dict) else "no fields"
      yield Skipped(where, f"no text field {text_field!r} (it has: {_short(keys)})")
      continue
    # A lone surrogate is legal JSON but no text.
    yield check_text(text.encode("utf-8", "surrogatepass"), where, domain)


def _lines(stream: io.BufferedIOBase) -> Iterator[bytes | None]:
  """The lines of a file; None for one that is too long, which is not kept."""
  while line := stream.readline(_MAX_DOCUMENT_BYTES + 1):
    if len(line) <= _MAX_DOCUMENT_BYTES:
      yield line
      continue
    while line and not line.endswith(b"\n"):
      line = stream.readline(_MAX_DOCUMENT_BYTES)
    yield None


def _short(text: str, limit: int = 200) -> str:
  text = readable(text[: limit + 1].encode("utf-8", "replace").decode())
  return text if len(text) <= limit else text[:limit] + "..."
