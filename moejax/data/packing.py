"""Packing: which tokens sequence g of an epoch holds, as pure arithmetic.

An epoch lays all documents end to end in a seeded order and cuts this line into
sequences of S places; only the last is padded. The sequences are then served in
their own seeded order, because neighbours on the line are often parts of one
long document. The documents of sequence g are found by binary search, so any
process can make any batch, in any order: processes, workers and restarts cannot
change what a step trains on.

Each place is an (input, target) pair. A document of n tokens t has inputs
[SEP, t1..tn] and targets [t1..tn, SEP]: every token, and the document's end, is
predicted once per epoch. Segment ids count 1, 2, ... within a sequence; 0 is
padding. A document cut by the end of a sequence continues in the line's next one as
a new segment, with positions from 0: the earlier part cannot be attended to, and
rotary positions stay below S.

Letters: B sequences of S places; D documents.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from moejax import splitmix
from moejax.data.tokens import TokenSplit

Batch = dict[str, np.ndarray]
"""inputs, targets, segment_ids, positions and, in evaluation, domain: int32 [B, S]."""

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
  """The g-th sequence served is the sequences[g]-th of the line."""

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
  *,
  with_domain: bool = False,
) -> Batch:
  """Returns the sequences with these numbers; padding for those outside [0, N)."""
  real = (served >= 0) & (served < len(layout.sequences))
  row = layout.sequences[np.where(real, served, 0)]
  place = row[:, None] * sequence_length + np.arange(sequence_length)[None, :]
  valid = (place < layout.num_places) & real[:, None]
  place = np.where(valid, place, (row * sequence_length)[:, None])
  # Each place's document on the line: one binary search for the whole batch.
  nth = np.searchsorted(layout.starts, place, side="right") - 1
  start = layout.starts[nth]
  source = split.offsets[layout.documents[nth]] + place - start
  positions = place - np.maximum(start, (row * sequence_length)[:, None])
  batch = {
    "inputs": split.tokens[source],
    "targets": split.tokens[source + 1],
    "segment_ids": nth - nth[:, :1] + 1,
    "positions": positions,
  }
  if with_domain:
    batch["domain"] = split.domains[layout.documents[nth]]
  return {k: np.where(valid, v, 0).astype(np.int32) for k, v in batch.items()}
