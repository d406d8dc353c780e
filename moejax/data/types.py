"""Types shared by the parts of the data pipeline."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

SPLITS = ("train", "validation", "test")

EMPTY = "empty"
"""The skip reason that `write_tokens` does not warn about."""


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
  """One text, as UTF-8 bytes; `name` describes its origin."""

  text: bytes
  name: str
  domain: str


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
  """A document that was left out, and why."""

  document: str
  reason: str


@runtime_checkable
class Source(Protocol):
  """Documents in three splits, in a fixed order, with a fingerprint of them all."""

  name: str

  @property
  def fingerprint(self) -> str:
    """Identifies the content and every option that changes what `documents` yields."""
    ...

  def documents(self, split: str) -> Iterator[Document | Skipped]:
    """Yields the documents of one split; prepares the dataset first if necessary."""
    ...

  def num_duplicates(self) -> int:
    """Returns how many documents were left out as duplicates."""
    ...


LOCAL = {
  "python_stdlib": "the running interpreter's standard library; embedded, no download",
  "python_packages": "the packages that moejax requires; embedded, no download",
  "text": "your own text: --config.data.path=DIR or FILE (.jsonl too; .gz .xz .zst)",
}
