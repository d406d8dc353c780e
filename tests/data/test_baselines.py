"""The baselines are on exactly the bytes that the loss covers."""

import lzma
import math

import numpy as np
import pytest

from moejax.data.baselines import (
  baselines,
  bits_per_byte,
  covered_bytes,
  unigram_bits_per_byte,
  xz_bits_per_byte,
)


def test_a_unigram_by_hand():
  """Counts a:3, b:1, add-one: p(a)=4/260, p(b)=2/260, p(c)=1/260; text 'abc'."""
  counts = np.zeros(256, np.int64)
  counts[[97, 98]] = 3, 1
  expected = -(math.log2(4 / 260) + math.log2(2 / 260) + math.log2(1 / 260)) / 3
  assert unigram_bits_per_byte(counts, b"abc") == pytest.approx(expected)


def test_xz_is_eight_times_the_compressed_share():
  """Of the text alone; LZMA of repeats is far below one bit a byte."""
  text = b"again and " * 1000
  size = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
  assert xz_bits_per_byte(text) == 8 * size / len(text) < 0.2


@pytest.mark.parametrize("limit", [0, 2])
def test_the_covered_bytes_are_the_targets_of_evaluation(small, limit):
  """All of the split, or what the first batches hold; separators are no text."""
  batches = list(small.eval_batches("test", 4, limit))
  sizes = sum(
    int(small.tokenizer.bytes_per_token[b["targets"][b["segment_ids"] > 0]].sum())
    for b in batches
  )
  text = covered_bytes(small, "test", 4, limit)
  assert len(text) == sizes
  whole = b"".join(small.raw_bytes("test"))
  assert whole.startswith(text) and (limit or text == whole)
  found = baselines(small, "test", 4, limit)
  assert found["bytes"] == len(text)
  # English-like text: a unigram is well below 8 bits, and xz below the unigram
  # once the text is long enough to pay for its header.
  assert found["unigram"] < 6
  assert limit or found["xz"] < found["unigram"]


def test_bits_per_byte_is_log2():
  """8 nats over 4 bytes are 2 / ln 2 bits a byte; no bytes is no division by zero."""
  assert bits_per_byte(8.0, 4) == pytest.approx(2 / math.log(2))
  assert bits_per_byte(0.0, 0) == 0.0
