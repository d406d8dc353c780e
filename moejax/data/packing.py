"""Packing: computes which tokens are in sequence g of an epoch, by pure arithmetic.

An epoch lays all documents end to end in a seeded order and cuts this line into
sequences of S places; only the last is padded. The sequences are then served in
their own seeded order, because neighbours on the line are often parts of one
long document. The documents of sequence g are found by binary search, so any
process can make any batch, in any order: processes, workers and restarts cannot
change what a step trains on.

Each place is an (input, target) pair. A document of n tokens t has inputs
[SEP, t1..tn] and targets [t1..tn, SEP]: every token, and the document's end, is
predicted once per epoch. Segment ids count 1, 2, ... within a sequence; 0 is
padding. A document cut by the end of a sequence continues in the next one on the line as
a new segment, with positions from 0. The earlier part cannot be attended to, and rotary
positions stay below S.

Letters: B sequences of S places; D documents.
"""

import dataclasses
from collections.abc import Callable
from typing import TypedDict, TypeVar, cast

import numpy as np
from jaxtyping import Bool, Int

from moejax import splitmix
from moejax.data.tokens import TokenSplit


class Batch(TypedDict):
  """This process's rows of a batch, as int32 in host memory; 0 is padding everywhere."""

  inputs: Int[np.ndarray, "B S"]
  targets: Int[np.ndarray, "B S"]
  segment_ids: Int[np.ndarray, "B S"]
  positions: Int[np.ndarray, "B S"]


class EvalBatch(Batch):
  """A batch of an evaluation."""

  domain: Int[np.ndarray, "B S"]
  """Index of each token's domain."""


AnyBatch = TypeVar("AnyBatch", bound=Batch)


_MASK = 2**64 - 1


def permutation(n: int, *key: int) -> Int[np.ndarray, "n"]:
  """Returns a permutation of range(n) that depends only on the integers of `key`.

  Not NumPy's: its streams may change between releases (NEP 19), and an upgrade must
  not affect a resumed run.
  """
  state = np.zeros(1, np.uint64)
  for part in key:
    mixed = splitmix.finalise(state ^ np.array([part & _MASK], np.uint64))
    state = mixed + splitmix.GAMMA
  steps = np.arange(n, dtype=np.uint64) * splitmix.GAMMA
  return np.argsort(splitmix.finalise(steps + state), kind="stable")


@dataclasses.dataclass(frozen=True)
class Layout:
  """The line of one epoch, and the order in which its sequences are served."""

  documents: Int[np.ndarray, "D"]
  """Document indices, in the order of the line."""
  starts: Int[np.ndarray, "D_plus_1"]
  """First place of each document on the line, and the line's end."""
  sequences: Int[np.ndarray, "N"]
  """The g-th sequence served is the sequences[g]-th on the line."""

  @property
  def num_places(self) -> int:
    """Number of places on the line."""
    return int(self.starts[-1])


def num_sequences(split: TokenSplit, sequence_length: int) -> int:
  """Returns N, the sequences per epoch, including the padded last one."""
  return -(-split.num_places // sequence_length)


def train_layout(
  split: TokenSplit, sequence_length: int, *, seed: int, epoch: int
) -> Layout:
  """Returns the layout of one training epoch."""
  documents = permutation(split.num_documents, seed, epoch, 0)
  lengths = np.diff(split.offsets)[documents]
  starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
  count = num_sequences(split, sequence_length)
  return Layout(documents, starts, permutation(count, seed, epoch, 1))


def eval_layout(split: TokenSplit, sequence_length: int) -> Layout:
  """Returns the layout with documents and sequences in stored order."""
  count = num_sequences(split, sequence_length)
  return Layout(np.arange(split.num_documents), split.offsets, np.arange(count))


def assemble(
  split: TokenSplit,
  layout: Layout,
  served: Int[np.ndarray, "B"],
  sequence_length: int,
) -> Batch:
  """Returns the sequences with these numbers; padding for those outside [0, N)."""
  return _assemble(split, layout, *_places(layout, served, sequence_length))


def assemble_eval(
  split: TokenSplit,
  layout: Layout,
  served: Int[np.ndarray, "B"],
  sequence_length: int,
) -> EvalBatch:
  """Returns the same as `assemble`, with domains."""
  place, valid, nth = _places(layout, served, sequence_length)
  domain = np.where(valid, split.domains[layout.documents[nth]], 0)
  batch = _assemble(split, layout, place, valid, nth)
  return {**batch, "domain": domain.astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class CausalPacker:
  """Makes batches of consecutive text, each token predicted from those before it."""

  sequence_length: int

  def prepare(self, split: TokenSplit) -> None:
    """Returns the data shared by all epochs of a split: none here."""
    del split

  def count(self, split: TokenSplit, prepared: None) -> int:
    """Returns the rows per epoch."""
    del prepared
    return num_sequences(split, self.sequence_length)

  def train_layout(
    self, split: TokenSplit, prepared: None, *, seed: int, epoch: int
  ) -> Layout:
    del prepared
    return train_layout(split, self.sequence_length, seed=seed, epoch=epoch)

  def eval_layout(self, split: TokenSplit, prepared: None) -> Layout:
    del prepared
    return eval_layout(split, self.sequence_length)

  def assemble(
    self, split: TokenSplit, layout: Layout, served: Int[np.ndarray, "B"]
  ) -> Batch:
    return assemble(split, layout, served, self.sequence_length)

  def assemble_eval(
    self, split: TokenSplit, layout: Layout, served: Int[np.ndarray, "B"]
  ) -> EvalBatch:
    return assemble_eval(split, layout, served, self.sequence_length)


def _assemble(
  split: TokenSplit,
  layout: Layout,
  place: Int[np.ndarray, "B S"],
  valid: Bool[np.ndarray, "B S"],
  nth: Int[np.ndarray, "B S"],
) -> Batch:
  """Returns the inputs and targets at the places; see `_places`."""
  start = layout.starts[nth]
  source = split.offsets[layout.documents[nth]] + place - start
  batch: Batch = {
    "inputs": split.tokens[source],
    "targets": split.tokens[source + 1],
    "segment_ids": nth - nth[:, :1] + 1,
    "positions": place - np.maximum(start, place[:, :1]),
  }
  return each(lambda values: np.where(valid, values, 0).astype(np.int32), batch)


def _places(
  layout: Layout, served: Int[np.ndarray, "B"], sequence_length: int
) -> tuple[Int[np.ndarray, "B S"], Bool[np.ndarray, "B S"], Int[np.ndarray, "B S"]]:
  """Returns places on the line, whether each is real, and its document on the line."""
  real = (served >= 0) & (served < len(layout.sequences))
  row = layout.sequences[np.where(real, served, 0)]
  place = row[:, None] * sequence_length + np.arange(sequence_length)[None, :]
  valid = (place < layout.num_places) & real[:, None]
  place = np.where(valid, place, (row * sequence_length)[:, None])
  # One binary search for the whole batch.
  return place, valid, np.searchsorted(layout.starts, place, side="right") - 1


def each(function: Callable[..., np.ndarray], *batches: AnyBatch) -> AnyBatch:
  """Applies a function to each array of one batch, or of several with the same keys."""
  made = {name: function(*(b[name] for b in batches)) for name in batches[0]}
  return cast(AnyBatch, made)
