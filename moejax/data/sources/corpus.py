"""Local text: the files of a corpus, and the documents in them.

A corpus is a folder (read recursively), or one file. A .jsonl file is one document
per line, from its text field; any other file is one document, with any suffix.
Each may be compressed as .gz, .xz or .zst. Hidden files and folders and __pycache__
are ignored.

A link to a file is read, wherever it leads. Pipes, sockets, devices, links to them or to
folders, and unreadable folders are left out and named.
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
from moejax.errors import ConfigError, did_you_mean
from moejax.storage.paths import is_url, refuse_url

COMPRESSIONS = (".gz", ".xz", ".zst")

_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)

_MAX_DOCUMENT_BYTES = 1 << 30
"""Longer documents do not fit the records of a prepared dataset, and a small compressed
file must not take more memory."""
_TOO_LONG = "longer than 1 GiB: cut it into several documents"
_ZSTD_BYTES = 1 << 13
"""Bytes read at once: at maximum compression, 8 KiB expand to 256 MiB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """A list of files and how to read them."""

  root: Path
  files: tuple[PurePath, ...]
  """Relative to root, sorted by POSIX path."""
  domain_of: Callable[[PurePath], str]
  text_field: str = "text"
  left_out: tuple[Skipped, ...] = ()
  """Entries of the folder that are not files. Not part of the fingerprint."""

  def locate(self, file: PurePath) -> Path:
    """Returns the path of one of `files`."""
    return self.root / file

  def read(self, file: PurePath) -> Iterator[Document | Skipped]:
    """Yields the documents of one file; a broken file ends with a `Skipped`."""
    name, domain = readable(file.as_posix()), readable(self.domain_of(file))
    try:
      with open_text(self.locate(file)) as stream:
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

  def select(self, domains: str) -> "Corpus":
    """Returns the part of the corpus that belongs to some domains.

    A document keeps its split, which depends only on the text.

    Args:
      domains: names, separated by commas.

    Raises:
      ConfigError: there is no such domain; names the nearest.
    """
    of = {file: readable(self.domain_of(file)) for file in self.files}
    wanted = [name.strip() for name in domains.split(",")]
    for name in wanted:
      if name not in of.values():
        known = sorted(set(of.values()))
        raise ConfigError(
          f"--config.data.domains={domains}: there is no domain {name!r}. "
          f"{did_you_mean(name, known)}"
        )
    files = tuple(file for file in self.files if of[file] in wanted)
    return dataclasses.replace(self, files=files)

  def documents(self) -> Iterator[Document | Skipped]:
    """Yields what was left out, then every document, including duplicates, in order."""
    yield from self.left_out
    for file in self.files:
      yield from self.read(file)

  def fingerprint(self) -> str:
    """Returns a hash of all names, domains and stored (compressed) bytes."""
    total = hashlib.sha256()
    for file in self.files:
      names = f"{file.as_posix()}\0{self.domain_of(file)}\0"
      # File names are bytes, and need not be UTF-8.
      total.update(names.encode("utf-8", "surrogateescape"))
      try:
        with files_lib.open_regular(self.locate(file)) as stream:
          total.update(hashlib.file_digest(stream, "sha256").digest())
      except OSError as e:
        total.update(f"unreadable {e.errno}".encode())
    return total.hexdigest()[:20]


def local_corpus(path: str, text_field: str) -> Corpus:
  """Returns the corpus at `config.data.path`.

  A file's domain is its top-level folder. At the top, a .jsonl file's is its stem, any
  other file's the given folder's name. A file given as the path uses its own stem.

  Raises:
    ConfigError: the path is missing, unreadable, or holds no file.
  """
  if not path:
    raise ConfigError(
      "--config.data.name=text needs --config.data.path=DIR: a folder of text, or a file."
    )
  if is_url(path):
    refuse_url(path, "--config.data.path")
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
  """Finds the files below `root`, except hidden ones and folders named in `skip`.

  Returns:
    The files (with links to files and dangling links), and what was left out.
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
        what = ""  # a dangling link, reported when it is read
      if what:
        leave_out(path, f"is {'a link to ' * path.is_symlink()}{what}, not a file")
      else:
        found.append(path.relative_to(root))
  files = tuple(PurePath(f) for f in sorted(found, key=lambda f: f.as_posix()))
  return files, tuple(sorted(left_out, key=lambda item: item.document))


def _tell_of_links(root: Path, files: tuple[PurePath, ...], path: str) -> None:
  """Warns of links to files outside the given folder."""
  # Not Path.resolve, which fails for a link to itself.
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
  """Returns a printable file name: names may hold any bytes, even escape codes."""
  text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
  return "".join(c if c.isprintable() else "?" for c in text)


def _plain_name(file: PurePath) -> str:
  """Returns the name without its compression suffix."""
  return file.name[: -len(file.suffix)] if file.suffix in COMPRESSIONS else file.name


class _ZstdFile(io.RawIOBase):
  """Decompresses all frames of a file.

  zstandard's own reader ends silently in a truncated file; this one raises.
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
  """Returns a document, unless it is empty, binary or not UTF-8."""
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
    # A lone surrogate is legal JSON but not text.
    yield check_text(text.encode("utf-8", "surrogatepass"), where, domain)


def _lines(stream: io.BufferedIOBase) -> Iterator[bytes | None]:
  """Yields the lines of a file; None for each line that is too long."""
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
