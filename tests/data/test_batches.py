"""Batches depend on (seed, step) alone; evaluation sees each token once."""

import itertools
import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from moejax.data import Dataset, load
from moejax.errors import PEER_LOST, ConfigError, PeerLostError, UserError
from tests.data.conftest import many, small_config


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
  """The first batches; then closes."""
  batches = list(itertools.islice(iterator, count))
  iterator.close()
  return batches


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for key in x:
      np.testing.assert_array_equal(x[key], y[key], err_msg=key)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_divide_the_rows_of_the_same_global_batch(small: Dataset, count):
  """Stacking every process's rows gives what one process alone would see."""
  alone = take(small.train_batches(8, seed=3), 4)
  parts = [
    take(small.train_batches(8, 3, process_index=i, process_count=count), 4)
    for i in range(count)
  ]
  together = [
    {k: np.concatenate([p[step][k] for p in parts]) for k in alone[step]}
    for step in range(4)
  ]
  assert_same(alone, together)


@pytest.mark.parametrize("kind", ["train_batches", "eval_batches"])
def test_any_rows_may_be_asked_for(small: Dataset, kind):
  """Rows that are no neighbours, as some meshes give them, are those of the whole."""
  rows = np.array([0, 3, 5])
  args = {"train_batches": (8, 3), "eval_batches": ("test", 8)}[kind]
  make = getattr(small, kind)
  alone, some = take(make(*args), 3), take(make(*args, rows=rows), 3)
  assert_same([{k: v[rows] for k, v in batch.items()} for batch in alone], some)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_read_every_token_of_an_epoch_once(small: Dataset, count):
  """Over one epoch, what the processes read adds up to the corpus, each token once."""
  steps = -(-small.num_sequences("train") // 8)
  parts = [
    take(small.train_batches(8, 0, process_index=i, process_count=count), steps)
    for i in range(count)
  ]
  # The last batch is filled up from the next epoch, in the order of its rows.
  end = small.num_sequences("train")
  numbers = np.arange(steps * 8).reshape(steps, count, -1)
  counts = np.zeros(264, np.int64)
  for index, part in enumerate(parts):
    for step, batch in enumerate(part):
      mine = (numbers[step, index] < end)[:, None] & (batch["segment_ids"] > 0)
      counts += np.bincount(batch["targets"][mine], minlength=264)
  np.testing.assert_array_equal(counts[:256], small.byte_counts("train"))
  assert counts.sum() == small.num_tokens("train")


def test_a_restart_goes_on_where_it_stopped(small: Dataset):
  """Starting at step n gives the n-th batch of an unbroken run, over epoch ends too."""
  steps = 2 * small.num_sequences("train") // 32 + 3
  unbroken = take(small.train_batches(32, seed=0), steps)
  for start in (1, steps // 2, steps - 2):
    resumed = take(small.train_batches(32, 0, start_step=start), steps - start)
    assert_same(unbroken[start:], resumed)


def test_another_seed_is_another_order(small: Dataset):
  """Seeds matter, and equal seeds agree between two loads."""
  first = take(small.train_batches(8, seed=0), 1)
  assert_same(first, take(load(small.config).train_batches(8, seed=0), 1))
  other = take(small.train_batches(8, seed=1), 1)
  assert (first[0]["inputs"] != other[0]["inputs"]).any()


def test_worker_processes_change_nothing(session_cache, small: Dataset):
  """Two workers, which interleave batches, deliver them in the order of one thread."""
  workers = load(small_config(session_cache, num_workers=2))
  got = take(workers.train_batches(8, seed=0, start_step=5), 5)
  assert_same(take(small.train_batches(8, seed=0, start_step=5), 5), got)


def test_a_killed_worker_is_one_line(session_cache):
  """As by the kernel for want of memory: named, with the code that means `restart`."""
  dataset = load(small_config(session_cache, num_workers=1, prefetch=1))
  before = set(multiprocessing.active_children())
  batches = dataset.train_batches(8, seed=0)
  next(batches)
  for worker in set(multiprocessing.active_children()) - before:
    worker.kill()
  with pytest.raises(PeerLostError, match=r"num_workers=1 ended with exit code -9"):
    take(batches, 1000)
  assert PeerLostError.exit_code == PEER_LOST


@pytest.mark.parametrize("prefetch", [0, 1, 9])
def test_prefetching_changes_nothing(session_cache, small: Dataset, prefetch):
  """However far ahead, and not at all."""
  other = load(small_config(session_cache, prefetch=prefetch))
  expected = take(small.train_batches(8, seed=0), 12)
  assert_same(expected, take(other.train_batches(8, seed=0), 12))


def test_one_epoch_of_steps_sees_every_sequence_once(small: Dataset):
  """Cut into batches that do not divide the epoch, the places are still all there."""
  total = small.num_tokens("train")
  count = small.num_sequences("train")
  batches = take(small.train_batches(5, seed=0), -(-count // 5))
  rows = np.concatenate([b["targets"] for b in batches])[:count]
  real = np.concatenate([b["segment_ids"] for b in batches])[:count] > 0
  assert real.sum() == total
  targets = rows[real]
  assert (targets == small.tokenizer.separator).sum() == small.num_documents("train")
  counts = np.bincount(targets, minlength=264)[:256]
  np.testing.assert_array_equal(counts, small.byte_counts("train"))


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_evaluation_sees_each_token_once_and_in_order(small: Dataset, batch_size):
  """The real targets, separators aside, are the split's documents end to end."""
  for split in ("train", "validation", "test"):
    batches = list(small.eval_batches(split, batch_size))
    assert all(b["inputs"].shape == (batch_size, 64) for b in batches)
    targets = np.concatenate([b["targets"][b["segment_ids"] > 0] for b in batches])
    assert len(targets) == small.num_tokens(split)
    assert small.tokenizer.decode_bytes(targets) == b"".join(small.raw_bytes(split))
    domain = np.concatenate([b["domain"][b["segment_ids"] > 0] for b in batches])
    assert domain.min() >= 0 and domain.max() < len(small.domains)


def test_evaluation_under_processes_and_a_limit(small: Dataset):
  """Rows divide as in training, and a limit counts global batches."""
  alone = list(small.eval_batches("test", 4, limit=3))
  parts = [
    list(small.eval_batches("test", 4, 3, process_index=i, process_count=2))
    for i in range(2)
  ]
  both = [
    {k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)
  ]
  assert len(alone) == 3
  assert_same(alone, both)


def test_domains_are_the_documents_own(small: Dataset):
  """A table's digits are labelled as of the domain `tables`."""
  for batch in small.eval_batches("train", 64):
    starts = (batch["positions"] == 1) & (batch["segment_ids"] > 0)
    for row, place in np.argwhere(starts):
      text = small.tokenizer.decode(batch["inputs"][row, place:])
      if text.startswith(("2 x 1 =", "17 x 1 =", "21 x 1 =")):
        assert small.domains[batch["domain"][row, place]] == "tables"


def test_closing_ends_the_threads(small: Dataset):
  """A run that stops leaves nothing running behind it."""
  before = set(threading.enumerate())
  iterator = small.train_batches(8, 0)
  next(iterator)
  assert any(t.name.startswith("grain") for t in threading.enumerate())
  iterator.close()
  deadline = time.monotonic() + 10
  while set(threading.enumerate()) - before and time.monotonic() < deadline:
    time.sleep(0.01)
  left = set(threading.enumerate()) - before
  assert not [t for t in left if t.name.startswith("grain-prefetch")]


def test_a_corpus_smaller_than_a_batch_is_refused_at_once(corpus_of):
  """Before the first batch is asked for, with the numbers in the message."""
  dataset = load(corpus_of(many(12)))
  with pytest.raises(ConfigError, match=r"batch_size=512.*lower one"):
    dataset.train_batches(512, 0)


def test_rows_must_divide_among_processes(small: Dataset):
  """A batch that 3 processes cannot share is refused at once."""
  with pytest.raises(ConfigError, match=r"batch_size=8.*3"):
    small.train_batches(8, 0, process_count=3)


def test_an_unknown_or_empty_split_is_refused(corpus_of, small: Dataset):
  """With the nearest name, or the flag that would fill it."""
  with pytest.raises(UserError, match="validation"):
    small.eval_batches("validatoin", 4)
  dataset = load(corpus_of(many(12), test_fraction=0.0))
  with pytest.raises(UserError, match="test_fraction"):
    dataset.eval_batches("test", 4)


def test_token_counts_are_those_of_the_text(small: Dataset, monkeypatch):
  """Bytes of the train split, counted in pieces too small for one document."""
  monkeypatch.setattr("moejax.data.dataset._COUNT_CHUNK", 100)
  text = b"".join(small.raw_bytes("train"))
  expected = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
  counts = small.token_counts("train")
  assert counts.shape == (small.tokenizer.vocab_size,)
  np.testing.assert_array_equal(counts[:256], expected)
  # One after each document, and the one before the first.
  assert counts[small.tokenizer.separator] == small.num_documents("train") + 1


def test_a_new_run_takes_over_the_tokenizer_it_starts_from(
  session_cache: Path, tmp_path: Path
):
  """`like`: parameters of another run know only the ids they were trained with."""
  bpe = small_config(session_cache, tokenizer="bpe", vocab_size=300)
  first = load(bpe, workdir=tmp_path)
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "other.txt").write_text("zebra quartz " * 500)
  text = small_config(session_cache, tokenizer="bpe", vocab_size=300)
  text.path = str(tmp_path / "other.txt")
  text.validation_fraction = text.test_fraction = 0.0
  taken = load(text, like=tmp_path)
  assert taken.tokenizer.fingerprint == first.tokenizer.fingerprint
  assert load(text).tokenizer.fingerprint != first.tokenizer.fingerprint
