"""Span corruption loses no token, fits its rows, and depends on seed and epoch alone."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moejax.config import DataConfig
from moejax.config.spans import num_replaced, num_spans, spans_of
from moejax.data import load
from moejax.data.sentinels import SentinelTokenizer, with_sentinels
from moejax.data.span_rows import SpanPacker, corrupt, cut, mask_of, restore
from moejax.data.tokenizer import ByteTokenizer
from moejax.data.tokens import TokenSplit
from tests.data.conftest import small_config
from tests.data.test_batches import assert_same, take

SEPARATOR = 256
SENTINELS = 363 - np.arange(100)


def split_of(lengths):
  """Documents of these lengths, whose tokens count up modulo 256."""
  tokens = [SEPARATOR]
  for length in lengths:
    start = len(tokens)
    tokens += [(start + i) % 256 for i in range(length)] + [SEPARATOR]
  offsets = np.concatenate(([0], np.cumsum(np.array(lengths) + 1)))
  domains = np.arange(len(lengths)) % 3
  return TokenSplit(np.array(tokens, np.uint16), offsets, domains)


def packer(**options):
  spans = spans_of(DataConfig(objective="span_corruption", **options))
  return SpanPacker(
    spans=spans, sentinels=SENTINELS, separator=SEPARATOR, start=SEPARATOR
  )


def segments(batch, row):
  """Yields the encoder's tokens and the targets of each segment of a row."""
  for number in range(1, batch["segment_ids"][row].max(initial=0) + 1):
    yield (
      batch["encoder_inputs"][row][batch["encoder_segment_ids"][row] == number],
      batch["targets"][row][batch["segment_ids"][row] == number],
    )


SIZES = st.fixed_dictionaries(
  {
    "size": st.integers(1, 300),
    "density": st.floats(0.02, 0.9),
    "mean_length": st.floats(1, 12),
    "key": st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 99)),
  }
)


@hypothesis.given(SIZES)
def test_a_mask_has_the_tokens_and_spans_that_its_length_says(given):
  """Counted in the mask; spans are apart, so each has a sentinel of its own."""
  size, density, mean = given["size"], given["density"], given["mean_length"]
  mask = mask_of(size, given["key"], density=density, mean_length=mean)
  assert mask.sum() == num_replaced(np.array(size), density)
  begins = mask & ~np.concatenate(([False], mask[:-1]))
  assert begins.sum() == num_spans(np.array(size), density, mean)


@hypothesis.given(SIZES)
def test_corruption_is_inverted_exactly(given):
  """Every token is in the input or in the targets, and sentinels are in order."""
  density, mean = given["density"], given["mean_length"]
  text = np.random.default_rng(given["size"]).integers(0, 256, given["size"])
  mask = mask_of(len(text), given["key"], density=density, mean_length=mean)
  marks = 10_000 - np.arange(400)
  encoder, targets = corrupt(text, mask, marks, SEPARATOR)
  np.testing.assert_array_equal(restore(encoder, targets, marks), text)
  wanted = marks[: num_spans(np.array(len(text)), density, mean)]
  for side in (encoder, targets):
    np.testing.assert_array_equal(side[np.isin(side, marks)], wanted)
    assert side[-1] == SEPARATOR


@hypothesis.given(
  st.lists(st.integers(0, 90), min_size=1, max_size=12),
  st.floats(0.05, 0.6),
  st.floats(1, 6),
  st.integers(16, 64),
)
def test_rows_hold_all_text_once_and_fit(lengths, density, mean, length):
  """The segments of all rows, restored, are the documents; and nothing is cut off."""
  split = split_of(lengths)
  own = packer(noise_density=density, mean_span_length=mean, sequence_length=length)
  layout = own.eval_layout(split, own.prepare(split))
  batch = own.assemble_eval(split, layout, np.arange(layout.cut.num_rows + 1))
  restored = [
    restore(*sides, SENTINELS)
    for row in range(layout.cut.num_rows)
    for sides in segments(batch, row)
  ]
  wanted = [
    split.tokens[start + 1 : end] for start, end in itertools.pairwise(split.offsets)
  ]
  np.testing.assert_array_equal(
    np.concatenate([[], *restored]), np.concatenate([[], *wanted])
  )
  assert (batch["segment_ids"] > 0).sum() == layout.cut.num_targets
  assert not batch["segment_ids"][-1].any() and not batch["encoder_inputs"][-1].any()


def test_the_decoder_reads_what_it_has_predicted_so_far():
  """Inputs are the targets one later, with a start for each segment; positions count."""
  split, own = split_of([70, 30, 44]), packer(sequence_length=64)
  batch = own.assemble(split, own.eval_layout(split, own.prepare(split)), np.arange(3))
  for row in range(3):
    ids = batch["segment_ids"][row]
    for number in range(1, ids.max() + 1):
      here = ids == number
      inputs, targets = batch["inputs"][row][here], batch["targets"][row][here]
      np.testing.assert_array_equal(inputs, [SEPARATOR, *targets[:-1]])
      np.testing.assert_array_equal(batch["positions"][row][here], range(here.sum()))


def test_density_and_span_length_are_those_asked_for_on_average():
  """Within 1% of text, over 400 segments of full rows."""
  split = split_of([9000])
  own = packer(sequence_length=128)
  pieces = cut(split, own.spans).sizes
  mean = num_spans(pieces, 0.15, 3.0).sum()
  replaced = num_replaced(pieces, 0.15).sum()
  assert replaced / pieces.sum() == pytest.approx(0.15, abs=0.005)
  assert replaced / mean == pytest.approx(3.0, abs=0.1)


def test_every_place_is_masked_equally_often():
  """The mask of a segment of 40 varies with the key, and only its last token is fixed."""
  masks = np.mean(
    [mask_of(40, (0, k), density=0.3, mean_length=3.0) for k in range(3000)], axis=0
  )
  assert masks[-1] == 1
  assert masks[0] == 0
  assert masks[8:-8].min() > 0.2 and masks[8:-8].max() < 0.4


def test_masks_change_with_the_epoch_and_rows_do_not():
  """Another epoch serves the same segments in another order, masked otherwise."""
  split, own = split_of([100] * 6), packer(sequence_length=64)
  prepared = own.prepare(split)
  first, second = (
    own.train_layout(split, prepared, seed=3, epoch=epoch) for epoch in (0, 1)
  )
  assert sorted(first.rows) == sorted(second.rows)
  assert list(first.rows) != list(second.rows)
  row = int(np.flatnonzero(second.rows == first.rows[0])[0])
  one = own.assemble(split, first, np.array([0]))
  other = own.assemble(split, second, np.array([row]))
  assert not np.array_equal(one["targets"], other["targets"])
  again = own.assemble(
    split, own.train_layout(split, prepared, seed=3, epoch=0), np.array([5, 0])
  )
  np.testing.assert_array_equal(again["targets"][1], one["targets"][0])


def test_sentinels_follow_the_tokenizers_ids_and_can_be_written():
  """Sentinel k of a vocabulary of V is V - 1 - k; a text round-trips with its marks."""
  data = DataConfig(objective="span_corruption", num_sentinels=5)
  tokenizer = with_sentinels(ByteTokenizer(), data)
  assert isinstance(tokenizer, SentinelTokenizer)
  assert tokenizer.vocab_size == 264 + 5
  ids = tokenizer.encode("a<extra_id_0>b<extra_id_4><extra_id_5>")
  assert ids[:4] == [97, 268, 98, 264]
  assert tokenizer.decode(ids) == "a<extra_id_0>b<extra_id_4><extra_id_5>"
  assert not tokenizer.bytes_per_token[264:].any()
  restored = [268, *b"xy", 264, *b"z"]
  assert tokenizer.fill(ids[:4], restored) == "axybz"
  assert tokenizer.fill(ids[:4], restored[:3]) == "axyb<extra_id_4>"


def test_a_resumed_run_and_its_processes_see_the_same_batches(session_cache):
  """From any step on; the rows of processes add up; an epoch ends on the way."""
  config = small_config(session_cache, objective="span_corruption")
  dataset = load(config)
  steps = dataset.num_sequences("train") // 8 + 2
  alone = take(dataset.train_batches(8, seed=3), steps)
  assert_same(alone[-3:], take(dataset.train_batches(8, 3, start_step=steps - 3), 3))
  parts = [
    take(dataset.train_batches(8, 3, process_index=i, process_count=2), 2)
    for i in range(2)
  ]
  assert_same(
    alone[:2],
    [{k: np.concatenate([p[s][k] for p in parts]) for k in alone[s]} for s in range(2)],
  )
  evaluated = take(dataset.eval_batches("validation", 8), 1000)
  targets = sum((batch["segment_ids"] > 0).sum() for batch in evaluated)
  assert targets == dataset.num_tokens("validation")
  assert not dataset.token_bytes.any()
