"""Local text as a source: a TFDS dataset in the cache, rebuilt if the text changes."""

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from moejax import files
from moejax.data import cache
from moejax.data.sources.corpus import Corpus
from moejax.data.sources.scan import Scan, duplicate_bytes, scan_corpus
from moejax.data.types import Document, Skipped
from moejax.errors import ConfigError

_FORMAT = 1
"""Incremented when the same text would be prepared differently."""

_MAX_NAMED = 1000
"""Maximum skipped documents named in report.json, which counts all of them."""


@dataclasses.dataclass(kw_only=True)
class LocalSource:
  """A `Source` over a local corpus, prepared once per content and options."""

  name: str
  corpus: Corpus
  flag: str
  """The flag and value that named this corpus, for messages."""
  root: Path
  """The cache directory."""
  validation: float
  test: float
  max_documents: int = 0

  fingerprint: str = dataclasses.field(init=False)
  """Changes exactly when a byte, a name or an option changes."""

  def __post_init__(self):
    options = (self.corpus.text_field, self.validation, self.test)
    self._key = cache.digest(_FORMAT, self.corpus.fingerprint(), *options)
    self.fingerprint = cache.digest(self._key, self.max_documents)

  def documents(self, split: str) -> Iterator[Document | Skipped]:
    """Yields documents in the order of their hashes, which is as good as shuffled."""
    if split == "train":
      report = self._report()
      yield from report.skipped
      # The report names only the first ones; the others are also counted.
      unnamed = Skipped(document="", reason="as those named before")
      yield from itertools.repeat(unnamed, report.num_unnamed)
    from moejax.data.sources import builder  # slow import, unused with cached tokens

    source = builder.read(self._directory / "dataset", split)
    if source is None:
      return
    count = min(len(source), self.max_documents or len(source))
    for example in itertools.islice(source, count):
      path, domain = example["path"].decode(), example["domain"].decode()
      yield Document(example["text"], path, domain)

  def num_duplicates(self) -> int:
    """Returns how many documents were left out as duplicates."""
    return self._report().num_duplicates

  def left_out(self) -> dict[str, Any]:
    """Returns which parts of the text are not used, JSON-ready; reads the text again.

    Returns:
      `duplicates` and `skipped` documents, `duplicate_bytes`, and `is_cut`: whether they
      are pieces of a single document.
    """
    report = self._report()
    size = 0
    if report.num_duplicates:
      size = duplicate_bytes(self.corpus, report.is_cut)
    return {
      "duplicates": report.num_duplicates,
      "duplicate_bytes": size,
      "skipped": len(report.skipped) + report.num_unnamed,
      "is_cut": report.is_cut,
    }

  @functools.cached_property
  def _directory(self) -> Path:
    # The cache key excludes max_documents, which only limits reading.
    return cache.build_once(
      self.root / "datasets" / self._key, self._build, what=f"dataset {self.name}"
    )

  def _report(self) -> Scan:
    try:
      report = files.read_json(self._directory / "report.json")
    except (OSError, ValueError) as e:
      raise cache.damaged(self._directory, e) from e
    skipped = [Skipped(**s) for s in report["skipped"]]
    unnamed = report["num_skipped"] - len(skipped)
    return Scan({}, report["is_cut"], skipped, report["num_duplicates"], unnamed)

  def _build(self, directory: Path) -> None:
    scan = scan_corpus(self.corpus, self.validation, self.test)
    self._check(scan)
    from moejax.data.sources import builder

    written = builder.prepare(self.corpus, scan, directory / "work")
    written.rename(directory / "dataset")
    shutil.rmtree(directory / "work")
    report = {
      "source": self.flag,
      "is_cut": scan.is_cut,
      "num_duplicates": scan.num_duplicates,
      "num_skipped": len(scan.skipped),
      "skipped": [dataclasses.asdict(s) for s in scan.skipped[:_MAX_NAMED]],
    }
    (directory / "report.json").write_text(json.dumps(report, indent=1), "utf-8")
    # `dataset.load` logs what was left out, at every load.
    logging.info("%s: %d documents prepared.", self.name, len(scan.splits))

  def _check(self, scan: Scan) -> None:
    if not scan.splits:
      first = scan.skipped[0]
      fields = all("no text field" in s.reason for s in scan.skipped)
      remedy = "Name the field with --config.data.text_field." if fields else ""
      raise ConfigError(
        f"{self.flag} holds no text: {len(scan.skipped)} documents skipped, the first"
        f" is {first.document}: {first.reason}. {remedy}".rstrip()
      )
    wanted = 1 + bool(self.validation) + bool(self.test)
    if len(scan.splits) < wanted:
      raise ConfigError(
        f"{self.flag} holds {len(scan.splits)} distinct document(s), too few for"
        f" {wanted} splits. Add text, or set --config.data.test_fraction=0."
      )
