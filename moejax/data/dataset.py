"""From a `DataConfig` to batches: the only entry point to the data pipeline."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Int

from moejax.config import DataConfig
from moejax.config.spans import spans_of
from moejax.data import cache, pipeline, tokenizer, tokens
from moejax.data.packing import AnyBatch, Batch, CausalPacker, EvalBatch
from moejax.data.sentinels import SentinelTokenizer, with_sentinels
from moejax.data.sources.registry import make_source
from moejax.data.span_rows import Cut, SpanPacker, cut
from moejax.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer
from moejax.data.types import SPLITS, Document, Skipped, Source
from moejax.errors import ConfigError, UserError, did_you_mean
from moejax.storage.paths import RunPath, run_path

_BPE_BYTES = 32 << 20
"""A BPE tokenizer learns from the first train documents that reach this many bytes."""

_COUNT_CHUNK = 1 << 24
_NAMED_IN_LOG = 5
_BPE_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A tokenized dataset and its tokenizer."""

  config: DataConfig
  tokenizer: Tokenizer
  tokens: tokens.TokenCache

  @functools.cached_property
  def fingerprint(self) -> str:
    """Equal exactly when the same (seed, step) gives the same batch.

    Assumes the same sequence length and batch size, which the config determines.
    """
    meta = self.tokens.meta
    return cache.digest(meta["format"], meta["fingerprint"], meta["tokenizer"])

  @property
  def corpus_fingerprint(self) -> str:
    """Fingerprint of the text alone, before any tokenizer."""
    return self.tokens.meta["fingerprint"]

  @property
  def domains(self) -> tuple[str, ...]:
    """Domain names, indexed by the `domain` of evaluation batches."""
    return tuple(self.tokens.meta["domains"])

  @property
  def skipped(self) -> list[Skipped]:
    """The first 1,000 documents left out, with the reason."""
    return [Skipped(**s) for s in self.tokens.meta["skipped"]]

  @property
  def num_skipped(self) -> int:
    """Number of documents left out, without duplicates; at most 1,000 of local text."""
    return self.tokens.meta["num_skipped"]

  @property
  def num_duplicates(self) -> int:
    """Number of documents left out as duplicates."""
    return self.tokens.meta["num_duplicates"]

  def num_documents(self, split: str) -> int:
    """Returns a split's number of documents; 0 if the dataset lacks the split."""
    return self._entry(split)["num_documents"]

  def num_tokens(self, split: str) -> int:
    """Returns a split's number of targets, separators (and sentinels) included."""
    if self.config.objective == "span_corruption":
      return self._cut(split).num_targets
    return self._entry(split)["num_places"]

  def num_bytes(self, split: str) -> int:
    """Returns the number of UTF-8 bytes of a split's documents."""
    return self._entry(split)["num_bytes"]

  def byte_counts(self, split: str) -> np.ndarray:
    """Returns how often each of the 256 bytes occurs: int64 [256]."""
    return np.array(self._entry(split)["byte_counts"], np.int64)

  def token_counts(self, split: str) -> np.ndarray:
    """Returns how often each vocabulary id occurs: int64 [V]."""
    self._entry(split)
    ids, counts = self.tokens.open(split).tokens, np.zeros(0, np.int64)
    for start in range(0, len(ids), _COUNT_CHUNK):
      # In pieces: bincount widens its input to eight bytes per token.
      piece = np.bincount(ids[start : start + _COUNT_CHUNK], minlength=len(counts))
      piece[: len(counts)] += counts
      counts = piece
    return np.pad(counts, (0, self.tokenizer.vocab_size - len(counts)))

  def num_sequences(self, split: str) -> int:
    """Returns the sequences per epoch, including the padded last one."""
    if self.config.objective == "span_corruption":
      return self._cut(split).num_rows
    return -(-self.num_tokens(split) // self.config.sequence_length)

  @functools.cached_property
  def token_bytes(self) -> Int[np.ndarray, "V"]:
    """Bytes of text that the target of each id stands for; 0 where undefined.

    The targets of span corruption are only a part of the text, so their bits per byte
    would not measure the text.
    """
    known = self.tokenizer.bytes_per_token
    causal = self.config.objective == "causal"
    return known if causal else np.zeros_like(known)

  @functools.cached_property
  def _packer(self) -> CausalPacker | SpanPacker:
    if self.config.objective == "causal":
      return CausalPacker(self.config.sequence_length)
    assert isinstance(self.tokenizer, SentinelTokenizer)
    return SpanPacker(
      spans=spans_of(self.config),
      sentinels=self.tokenizer.sentinels.astype(np.int64),
      separator=self.tokenizer.separator,
      start=self.tokenizer.start,
    )

  def _cut(self, split: str) -> Cut:
    if split not in self._cuts:
      self._entry(split)
      self._cuts[split] = cut(self.tokens.open(split), spans_of(self.config))
    return self._cuts[split]

  @functools.cached_property
  def _cuts(self) -> dict[str, Cut]:
    return {}

  def _entry(self, split: str) -> dict:
    if split not in SPLITS:
      raise UserError(f"--split={split!r} is unknown. {did_you_mean(split, SPLITS)}")
    return self.tokens.meta["splits"][split]

  def raw_bytes(self, split: str) -> Iterator[bytes]:
    """Yields the split's documents, in the order evaluation sees them."""
    self._entry(split)
    for ids in tokens.documents(self.tokens.open(split)):
      yield self.tokenizer.decode_bytes(ids)

  def check_batch_size(self, batch_size: int) -> None:
    """Rejects a corpus with too few sequences for one global batch."""
    have = self.num_sequences("train")
    if have < batch_size:
      length = self.config.sequence_length
      raise ConfigError(
        f"--config.data.name={self.config.name} gives {have} training sequences of"
        f" --config.data.sequence_length={length}, fewer than one batch of"
        f" --config.train.batch_size={batch_size}. Add text or lower one of the two."
      )

  def train_batches(
    self,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: Int[np.ndarray, "b"] | None = None,
  ) -> Generator[Batch, None, None]:
    """Returns endless batches, starting at step `start_step`.

    The global batch is a function of (seed, step); a process gets its rows of it.
    Close the iterator to end threads and workers.

    Args:
      batch_size: of the global batch.
      seed: of the order.
      start_step: step of the first batch.
      process_index: whose rows, if processes divide them evenly and in order.
      process_count: number of processes.
      rows: explicit rows instead, ascending: those that a mesh gives this process
        (`rules.local_rows`).

    Raises:
      ConfigError: immediately, if the corpus is smaller than a batch, or batch_size
        is not divisible by the number of processes.
    """
    self.check_batch_size(batch_size)
    if rows is None:
      rows = pipeline.process_rows(batch_size, process_index, process_count)
    source = pipeline.TrainSource(
      self.tokens,
      "train",
      packer=self._packer,
      batch_size=batch_size,
      rows=rows,
      seed=seed,
      start_step=start_step,
    )
    return self._iterate(source)

  def eval_batches(
    self,
    split: str,
    batch_size: int,
    limit: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: Int[np.ndarray, "b"] | None = None,
  ) -> Generator[EvalBatch, None, None]:
    """Returns batches with each token of a split once, in stored order.

    The last batch is padded.

    Args:
      split: train, validation or test.
      batch_size: global, as in `train_batches`.
      limit: maximum number of batches; 0 means all.
      process_index: whose rows, as in `train_batches`.
      process_count: number of processes.
      rows: explicit rows instead.

    Raises:
      UserError: immediately, if the split is unknown or empty.
    """
    if not self.num_tokens(split):
      raise UserError(
        f"--split={split}: {self.config.name} has no such documents. Choose another"
        f" split, or raise --config.data.{split}_fraction."
      )
    if rows is None:
      rows = pipeline.process_rows(batch_size, process_index, process_count)
    source = pipeline.EvalSource(
      self.tokens,
      split,
      packer=self._packer,
      batch_size=batch_size,
      rows=rows,
    )
    return self._iterate(source, limit)

  def _iterate(
    self, source: pipeline.BatchSource[AnyBatch], limit: int = 0
  ) -> Generator[AnyBatch, None, None]:
    workers, prefetch = self.config.num_workers, self.config.prefetch
    return pipeline.iterate(source, num_workers=workers, prefetch=prefetch, limit=limit)


def load(
  config: DataConfig,
  *,
  workdir: RunPath | str | None = None,
  like: RunPath | str | None = None,
  store: bool = True,
  check_corpus: Callable[[str], None] | None = None,
) -> Dataset:
  """Prepares and tokenizes the dataset of `config`, or finds it in the cache.

  Args:
    config: what to read.
    workdir: a run's directory. A run that has begun (it has a config.json) keeps the
      tokenizer stored there, for any text that is read; otherwise the tokenizer is
      stored there. None stores it in the cache only.
    like: directory of another run, whose tokenizer a new run adopts, since the
      parameters that it adopts fit no other.
    store: whether this process stores the tokenizer.
    check_corpus: called with the fingerprint of the text, before it is prepared.

  Raises:
    ConfigError, UserError: the flags, or the text they name, cannot be used.
  """
  _check(config)
  root = cache.cache_root(config.cache_dir)
  source = make_source(config, root)
  if check_corpus is not None:
    check_corpus(source.fingerprint)
  chosen = _stored_tokenizer(config, workdir, "--workdir")
  if chosen is None and like is not None:
    chosen = _stored_tokenizer(config, like, "--init_from")
  if chosen is None:
    chosen = _make_tokenizer(config, source, root)
  cached = tokens.token_cache(source, chosen, root)
  dataset = Dataset(config, with_sentinels(chosen, config), cached)
  if dataset.num_duplicates:
    logging.info("%s: %d duplicates left out.", config.name, dataset.num_duplicates)
  if dataset.num_skipped:
    named = [f"{s.document}: {s.reason}" for s in dataset.skipped[:_NAMED_IN_LOG]]
    more = ["..."] if dataset.num_skipped > len(named) else []
    logging.warning(
      "%s: %d documents skipped (%s).",
      config.name,
      dataset.num_skipped,
      "; ".join(named + more),
    )
  if workdir is not None and store:
    chosen.save(run_path(workdir))
  return dataset


def _check(config: DataConfig) -> None:
  tokenizer.check_name(config.tokenizer)
  if config.sequence_length < 1:
    raise ConfigError(
      f"--config.data.sequence_length={config.sequence_length} must be at least 1."
    )
  validation, test = config.validation_fraction, config.test_fraction
  if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
    raise ConfigError(
      f"--config.data.validation_fraction={validation} and --config.data.test_fraction="
      f"{test} must not be negative and must leave something for training."
    )
  for name in ("max_documents", "num_workers", "prefetch"):
    value = getattr(config, name)
    if value < 0:
      raise ConfigError(f"--config.data.{name}={value} must not be negative.")


def _stored_tokenizer(
  config: DataConfig, workdir: RunPath | str | None, flag: str
) -> Tokenizer | None:
  # Without config.json no run has begun, and a tokenizer there may come from a run
  # that was rejected.
  if workdir is None or not (run_path(workdir) / "config.json").exists():
    return None
  stored = tokenizer.load_tokenizer(workdir)
  if stored.kind != config.tokenizer:
    raise ConfigError(
      f"--config.data.tokenizer={config.tokenizer!r}, but {flag}={str(workdir)!r}"
      f" was begun with {stored.kind!r}. Keep that, or choose another {flag}."
    )
  if stored.kind == "bpe" and stored.vocab_size != config.vocab_size:
    raise ConfigError(
      f"--config.data.vocab_size={config.vocab_size}, but {flag}={str(workdir)!r}"
      f" was begun with {stored.vocab_size}. Keep that, or choose another {flag}."
    )
  return stored


def _make_tokenizer(config: DataConfig, source: Source, root: Path) -> Tokenizer:
  if config.tokenizer == "bytes":
    return ByteTokenizer()
  if config.tokenizer == "hf":
    raise ConfigError(
      "--config.data.tokenizer=hf is the tokenizer of an imported model, and this run "
      "has none. Start from such a run with --init_from, or use bytes or bpe."
    )

  def build(directory: Path) -> None:
    trained = BPETokenizer.train(_sample(source), config.vocab_size)
    trained.save(directory)

  key = cache.digest("bpe", _BPE_FORMAT, source.fingerprint, config.vocab_size)
  what = f"bpe tokenizer of {source.name}"
  directory = cache.build_once(root / "tokenizers" / key, build, what=what)
  try:
    return tokenizer.load_tokenizer(directory)
  except UserError as e:
    raise cache.damaged(directory, e) from e


def _sample(source: Source) -> Iterator[bytes]:
  """Yields the first train documents, until they reach `_BPE_BYTES`.

  Prepared datasets are stored in hash order, so the first documents are a sample.
  """
  size = 0
  for item in source.documents("train"):
    if isinstance(item, Document):
      yield item.text
      size += len(item.text)
      if size >= _BPE_BYTES:
        return
