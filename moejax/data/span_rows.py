"""Rows of span corruption: the texts of each row, and which of their tokens are masked.

Documents, in stored order, fill one row after the other. Each fills a row with as many of
its tokens as both sides have room for, and continues in the next row as a new segment.
That number depends only on the number of tokens (`config/spans`), so rows are the same in
every epoch. The order of the rows and the masks change, and depend only on seed, epoch
and text. So any process can make any batch, in any order.

A segment of text t1..t9 with two spans [t3 t4] and [t8 t9] is

  encoder   t1 t2 <0> t5 t6 t7 <1> SEP
  targets   <0> t3 t4 <1> t8 t9 SEP

and the decoder's inputs are a start token, then all targets except the last. Segment ids
of both sides count 1, 2, ... within the row, so that a segment reads its own text; 0 is
padding. No text is lost: each token is on one of the two sides.

Letters: B rows, S decoder's sequence, M encoder's sequence, P segments of a split,
N rows of a split.
Source: T5, arXiv:1910.10683, section 3.1.4, and its released code
(random_spans_noise_mask), which draws the lengths of spans and of the gaps between them
uniformly from all that have the right sum. As in T5, a text ends with a masked span. T5
cuts the text without regard to documents; here a segment belongs to one document.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from moejax.config.spans import Spans, num_replaced, num_spans
from moejax.data.packing import Batch, EvalBatch, permutation
from moejax.data.tokens import TokenSplit

_LEAST = 16
"""A document is not cut to fill less room than this, in tokens."""


class SpanBatch(Batch):
  """Both sides of a batch; the keys of `Batch` are the decoder's."""

  encoder_inputs: Int[np.ndarray, "B M"]
  encoder_segment_ids: Int[np.ndarray, "B M"]
  encoder_positions: Int[np.ndarray, "B M"]


class SpanEvalBatch(SpanBatch, EvalBatch):
  """A batch of an evaluation."""


@dataclasses.dataclass(frozen=True)
class Cut:
  """A split, cut into segments and rows."""

  starts: Int[np.ndarray, "P"]
  """First token of each segment in the split."""
  sizes: Int[np.ndarray, "P"]
  """Tokens of each segment."""
  documents: Int[np.ndarray, "P"]
  first: Int[np.ndarray, "N_plus_1"]
  """First segment of each row, and P."""
  num_targets: int
  """Number of targets of all segments together."""

  @property
  def num_rows(self) -> int:
    return len(self.first) - 1


@dataclasses.dataclass(frozen=True)
class SpanLayout:
  """One epoch: the cut, the order of the rows, and the key of the masks."""

  cut: Cut
  rows: Int[np.ndarray, "N"]
  key: tuple[int, int]


def cut(split: TokenSplit, spans: Spans) -> Cut:
  """Cuts a split into segments and rows."""
  encoder, decoder = spans.encoder_sizes.tolist(), spans.decoder_sizes.tolist()
  in_encoder = _most(spans.encoder_sizes, spans.encoder_length)
  in_decoder = _most(spans.decoder_sizes, spans.decoder_length)
  least = min(_LEAST, spans.longest)
  starts, sizes, documents, first = [], [], [], []
  room, target_room, num_targets = -1, -1, 0
  for document, (begin, end) in enumerate(zip(split.offsets[:-1], split.offsets[1:])):
    place, left = int(begin) + 1, int(end) - int(begin) - 1
    while left > 0:
      size = 0
      if room >= 0:
        size = min(in_encoder[room], in_decoder[target_room], left)
      if size < min(left, least):
        first.append(len(starts))
        room, target_room = spans.encoder_length, spans.decoder_length
        continue
      starts.append(place)
      sizes.append(size)
      documents.append(document)
      room, target_room = room - encoder[size], target_room - decoder[size]
      num_targets += decoder[size]
      place, left = place + size, left - size
  first.append(len(starts))
  return Cut(
    starts=np.array(starts, np.int64),
    sizes=np.array(sizes, np.int64),
    documents=np.array(documents, np.int64),
    first=np.array(first, np.int64),
    num_targets=num_targets,
  )


def _most(sizes: Int[np.ndarray, "n"], length: int) -> list[int]:
  """Returns the maximum number of tokens that fit, for each room from 0 to `length`."""
  return (np.searchsorted(sizes, np.arange(length + 1), side="right") - 1).tolist()


def mask_of(
  size: int, key: tuple[int, ...], *, density: float, mean_length: float
) -> Bool[np.ndarray, "n"]:
  """Returns which tokens of a segment are replaced; the last one always is.

  Args:
    size: tokens of the segment.
    key: integers that the mask depends on.
    density: as in `Spans`.
    mean_length: as in `Spans`.
  """
  replaced = int(num_replaced(size, density))
  spans = int(num_spans(size, density, mean_length))
  kept = _parts(size - replaced, spans, (*key, 0))
  masked = _parts(replaced, spans, (*key, 1))
  lengths = np.stack([kept, masked], axis=1).reshape(-1)
  return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def _parts(total: int, count: int, key: tuple[int, ...]) -> Int[np.ndarray, "count"]:
  """Returns `count` positive lengths of the given sum, drawn uniformly."""
  if total < count:  # A segment of one token, which is replaced.
    return np.full(count, total)
  ends = np.sort(permutation(total - 1, *key)[: count - 1]) + 1
  return np.diff(np.concatenate(([0], ends, [total])))


def corrupt(
  text: Int[np.ndarray, "n"],
  mask: Bool[np.ndarray, "n"],
  sentinels: Int[np.ndarray, "k"],
  separator: int,
) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "s"]]:
  """Returns the encoder's tokens and the targets of a segment."""
  begins = mask & ~np.concatenate(([False], mask[:-1]))
  marks = sentinels[np.cumsum(begins)[begins] - 1]
  seen = text.copy()
  seen[begins] = marks
  ends = np.array([separator])
  encoder = np.concatenate((seen[~mask | begins], ends))
  places = np.flatnonzero(begins[mask])
  targets = np.concatenate((np.insert(text[mask], places, marks), ends))
  return encoder, targets


def restore(
  encoder: Int[np.ndarray, "m"],
  targets: Int[np.ndarray, "s"],
  sentinels: Int[np.ndarray, "k"],
) -> Int[np.ndarray, "n"]:
  """Inverts `corrupt`: returns the text of a segment."""
  is_mark = np.isin(targets, sentinels)
  spans = np.split(targets[:-1], np.flatnonzero(is_mark[:-1]))[1:]
  by_mark = {int(span[0]): span[1:] for span in spans}
  parts = [by_mark.get(token, np.array([token])) for token in encoder[:-1].tolist()]
  return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class SpanPacker:
  """Makes batches of corrupted text; see `packing.CausalPacker`."""

  spans: Spans
  sentinels: Int[np.ndarray, "k"]
  separator: int
  start: int
  """First input of the decoder."""

  def prepare(self, split: TokenSplit) -> Cut:
    return cut(split, self.spans)

  def count(self, split: TokenSplit, cut: Cut) -> int:
    del split
    return cut.num_rows

  def train_layout(
    self, split: TokenSplit, cut: Cut, *, seed: int, epoch: int
  ) -> SpanLayout:
    del split
    return SpanLayout(cut, permutation(cut.num_rows, seed, epoch, 1), (seed, epoch))

  def eval_layout(self, split: TokenSplit, cut: Cut) -> SpanLayout:
    del split
    return SpanLayout(cut, np.arange(cut.num_rows), (0, 0))

  def assemble(
    self, split: TokenSplit, layout: SpanLayout, served: Int[np.ndarray, "B"]
  ) -> SpanBatch:
    """Returns the rows with these numbers; padding for those outside [0, N)."""
    return self._assemble(split, layout, served)[0]

  def assemble_eval(
    self, split: TokenSplit, layout: SpanLayout, served: Int[np.ndarray, "B"]
  ) -> SpanEvalBatch:
    """Returns the same as `assemble`, with the domains of targets."""
    batch, documents = self._assemble(split, layout, served)
    domain = np.where(batch["segment_ids"] > 0, split.domains[documents], 0)
    return {**batch, "domain": domain.astype(np.int32)}

  def _assemble(
    self, split: TokenSplit, layout: SpanLayout, served: Int[np.ndarray, "B"]
  ) -> tuple[SpanBatch, Int[np.ndarray, "B S"]]:
    shape = (len(served), self.spans.decoder_length)
    encoder_shape = (len(served), self.spans.encoder_length)
    batch: SpanBatch = {
      "inputs": np.zeros(shape, np.int32),
      "targets": np.zeros(shape, np.int32),
      "segment_ids": np.zeros(shape, np.int32),
      "positions": np.zeros(shape, np.int32),
      "encoder_inputs": np.zeros(encoder_shape, np.int32),
      "encoder_segment_ids": np.zeros(encoder_shape, np.int32),
      "encoder_positions": np.zeros(encoder_shape, np.int32),
    }
    documents = np.zeros(shape, np.int64)
    for row, number in enumerate(served.tolist()):
      if not 0 <= number < len(layout.rows):
        continue
      line = int(layout.rows[number])
      place = target_place = 0
      pieces = range(layout.cut.first[line], layout.cut.first[line + 1])
      for segment, piece in enumerate(pieces, 1):
        encoder, targets = self._corrupted(split, layout, piece)
        here = row, slice(place, place := place + len(encoder))
        there = row, slice(target_place, target_place := target_place + len(targets))
        batch["encoder_inputs"][here] = encoder
        batch["encoder_segment_ids"][here] = segment
        batch["encoder_positions"][here] = np.arange(len(encoder))
        batch["targets"][there] = targets
        batch["inputs"][there] = np.concatenate(([self.start], targets[:-1]))
        batch["segment_ids"][there] = segment
        batch["positions"][there] = np.arange(len(targets))
        documents[there] = layout.cut.documents[piece]
    return batch, documents

  def _corrupted(
    self, split: TokenSplit, layout: SpanLayout, piece: int
  ) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "s"]]:
    begin, size = int(layout.cut.starts[piece]), int(layout.cut.sizes[piece])
    text = split.tokens[begin : begin + size].astype(np.int64)
    mask = mask_of(
      size,
      (*layout.key, 2, piece),
      density=self.spans.density,
      mean_length=self.spans.mean_length,
    )
    return corrupt(text, mask, self.sentinels, self.separator)
