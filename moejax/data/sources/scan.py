"""Decides which documents of a corpus are kept, and in which split.

Of documents with equal bytes, only the first is kept. The split is a function of the
content only (except in tiny corpora), so a document keeps its split when others are added
or removed, and no document can be in two splits.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

from moejax.data.sources.corpus import Corpus
from moejax.data.types import SPLITS, Document, Skipped

_PIECE_BYTES = (512, 16_384)
"""Bounds of the target size of the pieces of a single-document corpus."""


def content_hash(text: bytes) -> bytes:
  """Returns the hash that identifies equal documents and decides the split."""
  return hashlib.sha256(text).digest()


def split_of(content: bytes, validation: float, test: float) -> str:
  """Returns the split of a document with this content hash."""
  place = int.from_bytes(content[:8], "big") / 2**64
  if place < validation:
    return "validation"
  return "test" if place < validation + test else "train"


def assign_splits(
  contents: list[bytes], validation: float, test: float
) -> dict[bytes, str]:
  """Returns the split of each content hash.

  In a small corpus a requested split can be empty. It then gets the training document
  with the smallest hash, if there are at least two (train gets one from validation).
  """
  splits = {c: split_of(c, validation, test) for c in contents}
  for split, fraction in zip(SPLITS, (1.0, validation, test), strict=True):
    if not fraction or split in splits.values():
      continue
    donor = "train" if split != "train" else "validation"
    rest = sorted(c for c, s in splits.items() if s == donor)
    if len(rest) >= 2:
      splits[rest[0]] = split
  return splits


def cut(document: Document) -> Iterator[Document]:
  """Cuts a document at blank lines, else line ends, spaces or between characters.

  For a corpus of one document (such as a book), which cannot be split by documents. The
  concatenated pieces are the document.
  """
  text, least, most = document.text, *_PIECE_BYTES
  target = min(max(len(text) // 64, least), most)
  start = 0
  while start < len(text):
    end = start + target
    if end < len(text):
      for mark in (b"\n\n", b"\n", b" "):
        found = text.rfind(mark, start + target // 2, end)
        if found >= 0:
          end = found + len(mark)
          break
      # Never inside a UTF-8 character, whose continuation bytes are 10xxxxxx.
      while end < len(text) and text[end] & 0xC0 == 0x80:
        end += 1
    piece = text[start:end]
    yield Document(piece, f"{document.name}@{start}", document.domain)
    start = end


@dataclasses.dataclass(frozen=True)
class Scan:
  """The result of a first pass over the corpus."""

  splits: dict[bytes, str]
  """Split of each content hash; one entry per distinct document."""
  is_cut: bool
  """Whether the corpus is one document, cut into pieces."""
  skipped: list[Skipped]
  num_duplicates: int
  num_unnamed: int = 0
  """Number of skipped documents that are not in `skipped`."""


def documents_of(corpus: Corpus, is_cut: bool) -> Iterator[Document | Skipped]:
  """Yields the corpus, with its one document cut into pieces if `is_cut`."""
  for item in corpus.documents():
    if is_cut and isinstance(item, Document):
      yield from cut(item)
    else:
      yield item


def duplicate_bytes(corpus: Corpus, is_cut: bool) -> int:
  """Returns the total length of the documents that are left out as duplicates."""
  seen: set[bytes] = set()
  total = 0
  for item in documents_of(corpus, is_cut):
    if isinstance(item, Document):
      content = content_hash(item.text)
      total += len(item.text) if content in seen else 0
      seen.add(content)
  return total


def scan_corpus(corpus: Corpus, validation: float, test: float) -> Scan:
  """Plans the splits and the documents to leave out; reads a single document twice."""

  def read(is_cut: bool) -> tuple[dict[bytes, None], list[Skipped], int]:
    contents: dict[bytes, None] = {}
    skipped, duplicates = [], 0
    for item in documents_of(corpus, is_cut):
      if isinstance(item, Skipped):
        skipped.append(item)
        continue
      content = content_hash(item.text)
      duplicates += content in contents
      contents[content] = None
    return contents, skipped, duplicates

  contents, skipped, duplicates = read(is_cut=False)
  is_cut = len(contents) == 1
  if is_cut:
    contents, skipped, duplicates = read(is_cut=True)
  splits = assign_splits(list(contents), validation, test)
  return Scan(splits, is_cut, skipped, duplicates)
