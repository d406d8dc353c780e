"""Baselines without a model: two compressors' bits per byte on the evaluated text.

unigram  the best that a model without context can do, from the frequency of each byte
         in the train split (add-one smoothed).
xz       LZMA, preset 9 extreme, of the held-out text alone, as `xz -9e` compresses
         it, without training text. A model that saw 10 MB of similar text should win.

Both are in bits per byte over exactly the bytes that an evaluation's targets
cover. A model's loss also pays for the separators, but is divided by the same
bytes, so the comparison favours the baselines.
"""

import lzma
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from moejax.data.dataset import Dataset

_CHUNK = 1 << 18
"""Bytes compressed between two progress reports; does not affect the result."""


def covered_bytes(
  dataset: Dataset, split: str, batch_size: int = 0, limit: int = 0
) -> bytes:
  """Returns the bytes of the targets of `eval_batches(split, batch_size, limit)`.

  A token counts with all its bytes; a character cut by the limit stays cut.
  """
  if not limit:
    return b"".join(dataset.raw_bytes(split))
  parts: list[bytes] = []
  for batch in dataset.eval_batches(split, batch_size, limit):
    targets = batch["targets"][batch["segment_ids"] > 0]
    parts.append(dataset.tokenizer.decode_bytes(targets))
  return b"".join(parts)


def unigram_bits_per_byte(counts: Int[np.ndarray, "256"], text: bytes) -> float:
  """Returns the cross-entropy of `text` under the add-one smoothed `counts`."""
  probs = (counts + 1.0) / (counts.sum() + 256.0)
  found = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
  return float(-(found * np.log2(probs)).sum() / len(text))


def xz_bits_per_byte(
  text: bytes, progress: Callable[[int], None] = lambda done: None
) -> float:
  """Returns 8 * compressed size / size, with the container that `xz` writes.

  Args:
    text: to compress.
    progress: called with the number of bytes compressed so far.
  """
  packer = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
  size = 0
  for start in range(0, len(text), _CHUNK):
    size += len(packer.compress(text[start : start + _CHUNK]))
    progress(min(start + _CHUNK, len(text)))
  return 8.0 * (size + len(packer.flush())) / len(text)


def baselines(
  dataset: Dataset,
  split: str = "validation",
  batch_size: int = 0,
  limit: int = 0,
  progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
  """Returns the bits per byte of `unigram` and `xz`, and `bytes`, the number covered.

  Args:
    dataset: its train split gives the unigram frequencies.
    split: the split the loss was measured on.
    batch_size: as in the evaluation; only matters with a limit.
    limit: as in the evaluation; 0 means all.
    progress: called with the number of bytes that xz, the slow part, has compressed.
  """
  text = covered_bytes(dataset, split, batch_size, limit)
  return {
    "unigram": unigram_bits_per_byte(dataset.byte_counts("train"), text),
    "xz": xz_bits_per_byte(text, progress),
    "bytes": float(len(text)),
  }


def bits_per_byte(nats: float, num_bytes: float) -> float:
  """Converts a summed loss in nats to bits per byte of the targets' text."""
  return float(nats / np.log(2.0) / max(num_bytes, 1.0))
