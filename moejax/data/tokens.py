"""The token cache: a split as one flat array of tokens, memory-mapped from disk.

Documents are stored end to end, each after a separator, with one more separator at
the end:

  SEP a1 a2 a3 SEP b1 b2 SEP c1 SEP

so the target of the input at place i is simply the token at i + 1. A document of
n tokens owns n + 1 places, starting with its separator.
"""

import array
import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from absl import logging
from jaxtyping import Int, Shaped

from moejax import files
from moejax.data import cache
from moejax.data.tokenizer import Tokenizer
from moejax.data.types import EMPTY, SPLITS, Document, Skipped, Source
from moejax.errors import UserError
from moejax.storage.full import save_array

_FORMAT = 1
"""Incremented when the meaning of the files changes."""

MAX_DOMAINS = 64
"""With more domains, the smallest become `OTHER`, so that tables stay readable."""

OTHER = "(other)"

_BATCH_BYTES = 4 << 20
_MAX_NAMED = 1000


@dataclasses.dataclass(frozen=True)
class TokenSplit:
  """One split: D documents, P places."""

  tokens: Shaped[np.ndarray, "P_plus_1"]
  """uint16 or uint32, memory-mapped."""
  offsets: Int[np.ndarray, "D_plus_1"]
  """First place of each document, and P."""
  domains: Int[np.ndarray, "D"]

  @property
  def num_documents(self) -> int:
    """D."""
    return len(self.domains)

  @property
  def num_places(self) -> int:
    """P: (input, target) pairs, of which D have a separator as target."""
    return int(self.offsets[-1])


@dataclasses.dataclass(frozen=True)
class TokenCache:
  """A tokenized dataset on disk."""

  directory: Path

  @functools.cached_property
  def meta(self) -> dict[str, Any]:
    """meta.json: counts per split, domain names, skipped documents."""
    try:
      return files.read_json(self.directory / "meta.json")
    except (OSError, ValueError) as e:
      raise cache.damaged(self.directory, e) from e

  def open(self, split: str) -> TokenSplit:
    """Opens one split: maps its tokens, loads its index arrays."""
    stem = self.directory / split
    dtype = np.dtype(self.meta["dtype"])
    try:
      opened = TokenSplit(
        # A plain view: indexing a memmap makes every result a memmap.
        tokens=np.memmap(f"{stem}.tokens", dtype, "r").view(np.ndarray),
        offsets=np.load(f"{stem}.offsets.npy"),
        domains=np.load(f"{stem}.domains.npy"),
      )
    except (OSError, ValueError, EOFError) as e:
      raise cache.damaged(self.directory, e) from e
    if len(opened.tokens) != opened.num_places + 1:
      error = ValueError(f"{split}.tokens has the wrong size")
      raise cache.damaged(self.directory, error)
    return opened


def token_cache(source: Source, tokenizer: Tokenizer, root: Path) -> TokenCache:
  """Returns the token cache of a dataset and a tokenizer, created if missing.

  Raises:
    UserError: the dataset has no training text.
  """
  key = cache.digest(_FORMAT, source.fingerprint, tokenizer.fingerprint)

  def build(directory: Path) -> None:
    write_tokens(directory, source, tokenizer)

  what = f"tokens of {source.name} ({tokenizer.kind})"
  return TokenCache(cache.build_once(root / "tokens" / key, build, what=what))


def _batches(
  items: Iterator[Document | Skipped], skipped: list[Skipped]
) -> Iterator[list[Document]]:
  """Yields lists of documents of about `_BATCH_BYTES`; adds skipped ones to `skipped`."""
  batch, size = [], 0
  for item in items:
    if isinstance(item, Skipped):
      skipped.append(item)
      continue
    batch.append(item)
    size += len(item.text)
    if size >= _BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


class _Writer:
  """Writes one split, keeping only lengths, domains and byte counts in memory."""

  def __init__(self, stem: Path, tokenizer: Tokenizer, dtype: np.dtype):
    self._stem, self._tokenizer, self._dtype = stem, tokenizer, dtype
    # Eight bytes per document: a web corpus has hundreds of millions.
    self.lengths = array.array("q")
    self._domains = array.array("q")
    self._names: dict[str, int] = {}
    self.byte_counts = np.zeros(256, np.int64)
    self.bytes_of_domain: Counter[str] = Counter()

  def add(self, file: BinaryIO, batch: list[Document]) -> None:
    """Appends documents."""
    separator = np.array([self._tokenizer.separator], self._dtype)
    encoded = self._tokenizer.encode_batch([d.text for d in batch])
    for document, ids in zip(batch, encoded, strict=True):
      file.write(separator.tobytes())
      file.write(ids.astype(self._dtype).tobytes())
      self.lengths.append(len(ids) + 1)
      self._domains.append(self._names.setdefault(document.domain, len(self._names)))
      self.bytes_of_domain[document.domain] += len(document.text)
      counts = np.bincount(np.frombuffer(document.text, np.uint8), minlength=256)
      self.byte_counts += counts

  def finish(self, index_of_domain: dict[str, int]) -> dict[str, Any]:
    """Writes the index files; returns the split's entry in meta.json."""
    offsets = np.zeros(len(self.lengths) + 1, np.int64)
    np.cumsum(np.array(self.lengths), out=offsets[1:])
    renumber = np.array([index_of_domain[d] for d in self._names], np.int32)
    domains = renumber[np.array(self._domains)]
    for name, values in (("offsets", offsets), ("domains", domains)):
      with open(f"{self._stem}.{name}.npy", "wb") as file:
        save_array(file, values)
    return {
      "num_documents": len(domains),
      "num_places": int(offsets[-1]),
      "num_bytes": int(self.byte_counts.sum()),
      "byte_counts": self.byte_counts.tolist(),
    }


def write_tokens(directory: Path, source: Source, tokenizer: Tokenizer) -> None:
  """Encodes every document of every split into `directory`."""
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
  skipped: list[Skipped] = []
  writers: dict[str, _Writer] = {}
  for split in SPLITS:
    writers[split] = writer = _Writer(directory / split, tokenizer, dtype)
    with open(directory / f"{split}.tokens", "wb") as file:
      for batch in _batches(source.documents(split), skipped):
        writer.add(file, batch)
      file.write(np.array([tokenizer.separator], dtype).tobytes())
  if not writers["train"].lengths:
    first = f" The first of {len(skipped)} skipped: {skipped[0]}." if skipped else ""
    raise UserError(f"{source.name} has no training text.{first}")
  domains, index_of_domain = _number_domains(writers.values())
  splits = {s: w.finish(index_of_domain) for s, w in writers.items()}
  for item in [s for s in skipped if s.reason != EMPTY][:20]:
    logging.warning("Skipped %s: %s", item.document, item.reason)
  meta = {
    "format": _FORMAT,
    "source": source.name,
    "fingerprint": source.fingerprint,
    "tokenizer": tokenizer.fingerprint,
    "dtype": dtype.name,
    "domains": domains,
    "splits": splits,
    "num_duplicates": source.num_duplicates(),
    "num_skipped": len(skipped),
    "skipped": [dataclasses.asdict(s) for s in skipped[:_MAX_NAMED]],
  }
  (directory / "meta.json").write_text(json.dumps(meta), "utf-8")


def _number_domains(writers: Any) -> tuple[list[str], dict[str, int]]:
  """Returns domain names, sorted with `OTHER` last, and each domain's index."""
  sizes: Counter[str] = sum((w.bytes_of_domain for w in writers), Counter())
  kept = [d for d, _ in sizes.most_common()]
  if len(kept) > MAX_DOMAINS:
    kept = kept[: MAX_DOMAINS - 1]
  names = sorted(kept) + ([OTHER] if len(kept) < len(sizes) else [])
  place = {d: i for i, d in enumerate(names)}
  index = {d: place[d] if d in place else len(names) - 1 for d in sizes}
  return names, index


def documents(split: TokenSplit) -> Iterator[Shaped[np.ndarray, "n"]]:
  """Yields the tokens of each document, without separators."""
  for start, end in itertools.pairwise(split.offsets.tolist()):
    yield split.tokens[start + 1 : end]
