"""What the parts of the data pipeline hand to each other."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

SPLITS = ("train", "validation", "test")

EMPTY = "empty"
"""The reason for skipping that deserves no warning."""


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
  """One text, as UTF-8 bytes; `name` says where it came from."""

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
  """Documents in three splits, in a fixed order, with a fingerprint of it all."""

  name: str

  @property
  def fingerprint(self) -> str:
    """Of the content and of every option that changes what `documents` yields."""
    ...

  def documents(self, split: str) -> Iterator[Document | Skipped]:
    """The documents of one split; prepares the dataset first if need be."""
    ...

  def num_duplicates(self) -> int:
    """Documents left out because an equal one is in."""
    ...


LOCAL = {
  "python_stdlib": "the running interpreter's standard library; embedded, no download",
  "text": "your own text: --config.data.path=DIR or FILE (.jsonl too; .gz .xz .zst)",
}
