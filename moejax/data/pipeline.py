"""Batches through Grain: threads or worker processes that prefetch them.

The source has random access by step (`moejax.data.packing`), so Grain only adds
prefetching. The position to save is the step, and nothing here has state.
"""

import math
import re
import threading
from collections.abc import Generator
from typing import Any, Generic

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from moejax.data.packing import AnyBatch, Batch, CausalPacker, EvalBatch, each
from moejax.data.span_rows import SpanPacker
from moejax.data.tokens import TokenCache, TokenSplit
from moejax.errors import ConfigError, PeerLostError

_ENDLESS = 2**62
"""Length of a training source, as reported to Grain."""

_LOST_WORKER = re.compile(r"Worker process was terminated .*(exit code -\d+)")
"""Grain's message about a worker that was ended by a signal."""


def process_rows(batch_size: int, index: int, count: int) -> Int[np.ndarray, "b"]:
  """Returns the index-th of `count` equal parts of a global batch's rows.

  Raises:
    ConfigError: the rows do not divide evenly.
  """
  if batch_size < 1 or batch_size % count:
    raise ConfigError(
      f"--config.train.batch_size={batch_size} must be a positive multiple of the"
      f" number of processes, {count}."
    )
  rows = batch_size // count
  return np.arange(index * rows, (index + 1) * rows)


class BatchSource(Generic[AnyBatch]):
  """This process's rows of the global batch of each step: a Grain source."""

  def __init__(
    self,
    tokens: TokenCache,
    split: str,
    *,
    packer: CausalPacker | SpanPacker,
    batch_size: int,
    rows: Int[np.ndarray, "b"],
  ):
    """Takes the global `batch_size`, and the `rows` of it that this process makes."""
    self._tokens, self._split_name = tokens, split
    self._packer: Any = packer
    self._batch_size = batch_size
    self._rows = rows
    self._open()

  def _open(self) -> None:
    self._split: TokenSplit = self._tokens.open(self._split_name)
    self._prepared = self._packer.prepare(self._split)
    self._num_sequences = self._packer.count(self._split, self._prepared)
    self._layouts: dict[int, Any] = {}
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    """Drops what a worker process creates again: mapped files, layouts and lock."""
    mapped = ("_split", "_prepared", "_layouts", "_lock")
    return {k: v for k, v in self.__dict__.items() if k not in mapped}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def _layout(self, epoch: int) -> Any:
    with self._lock:
      if epoch not in self._layouts:
        # A batch spans two epochs at most (`check_batch_size`): keep two layouts.
        while len(self._layouts) > 1:
          self._layouts.pop(min(self._layouts))
        self._layouts[epoch] = self._make_layout(epoch)
      return self._layouts[epoch]

  def _make_layout(self, epoch: int) -> Any:
    raise NotImplementedError

  def __len__(self) -> int:
    raise NotImplementedError

  def __getitem__(self, index: int) -> AnyBatch:
    raise NotImplementedError


class TrainSource(BatchSource[Batch]):
  """Maps steps to batches, over as many epochs as needed."""

  def __init__(self, *args: Any, seed: int, start_step: int, **kwargs: Any):
    """Makes element 0 the batch of step `start_step`."""
    self._seed, self._start_step = seed, start_step
    super().__init__(*args, **kwargs)

  def _make_layout(self, epoch: int) -> Any:
    make = self._packer.train_layout
    return make(self._split, self._prepared, seed=self._seed, epoch=epoch)

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: int) -> Batch:
    """Returns the rows of step `start_step + index`."""
    step = self._start_step + int(index)
    numbers = step * self._batch_size + self._rows
    epochs, served = np.divmod(numbers, self._num_sequences)
    parts = [
      self._packer.assemble(self._split, self._layout(epoch), served[epochs == epoch])
      for epoch in np.unique(epochs).tolist()
    ]
    # Rows ascend and so do their epochs: the parts are in row order.
    return each(lambda *arrays: np.concatenate(arrays), *parts)


class EvalSource(BatchSource[EvalBatch]):
  """Each place of a split once, in stored order; the last batch is padded."""

  def _make_layout(self, epoch: int) -> Any:
    return self._packer.eval_layout(self._split, self._prepared)

  def __len__(self) -> int:
    return math.ceil(self._num_sequences / self._batch_size)

  def __getitem__(self, index: int) -> EvalBatch:
    """Returns the rows of batch `index`."""
    served = int(index) * self._batch_size + self._rows
    layout = self._layout(0)
    return self._packer.assemble_eval(self._split, layout, served)


def iterate(
  source: BatchSource[AnyBatch], *, num_workers: int, prefetch: int, limit: int = 0
) -> Generator[AnyBatch, None, None]:
  """Yields a source's batches through Grain; closing it ends its threads and workers.

  Raises:
    PeerLostError: a worker was killed from outside.
  """
  dataset = grain.MapDataset.source(source)
  if limit:
    dataset = dataset[:limit]
  # One thread: NumPy holds the interpreter lock for most of the work.
  threads = 1 if prefetch and not num_workers else 0
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, 1))
  batches = dataset.to_iter_dataset(options)
  if num_workers:
    # Grain's workers refuse to start while absl's flags are unparsed, as they are
    # when moejax is used as a library.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    workers = grain.MultiprocessingOptions(
      num_workers=num_workers, per_worker_buffer_size=max(prefetch, 1)
    )
    batches = batches.mp_prefetch(workers)
  iterator = iter(batches)
  try:
    yield from iterator
  except RuntimeError as error:
    if found := _LOST_WORKER.search(str(error)):
      raise PeerLostError(
        f"a worker of --config.data.num_workers={num_workers} ended with {found[1]} "
        "(killed from outside, or by the system for lack of memory). The same command "
        "continues from the newest checkpoint; fewer workers, or 0, need less memory."
      ) from error
    raise
  finally:
    iterator.close()
