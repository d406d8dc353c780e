"""Each process reads its own rows, and together they read all of them once."""

import sys

import numpy as np
import pytest

from moejax.cli import launch_local
from moejax.data import load
from tests.data.conftest import small_config

_READ = """
import contextlib
import sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from moejax.launch import distributed
from moejax.sharding import mesh as meshes, rules
from tests.data.conftest import small_config
from moejax.data import load

stack = contextlib.ExitStack()
stack.enter_context(distributed.joined())
cache, out = sys.argv[1:]
dataset, batch = load(small_config(cache)), 8
steps = -(-dataset.num_sequences("train") // batch)

def read(shape, order):
  devices = np.asarray(jax.devices())[order].reshape(shape)
  mesh = Mesh(devices, meshes.AXES, axis_types=(AxisType.Auto,) * 4)
  mine = dataset.train_batches(batch, 0, rows=rules.local_rows(mesh, batch))
  whole = dataset.train_batches(batch, 0)
  seen = []
  for _ in range(steps):
    rows, everything = next(mine), next(whole)
    placed = rules.put_rows(mesh, rows["inputs"])
    assert placed.shape == everything["inputs"].shape
    for shard in placed.addressable_shards:
      np.testing.assert_array_equal(shard.data, everything["inputs"][shard.index])
    seen.append(np.stack([rows["targets"], rows["segment_ids"]]))
  mine.close(), whole.close()
  return np.concatenate(seen, axis=1)

np.savez(
  f"{out}/{jax.process_index()}.npz",
  apart=read((4, 1, 1, 1), [0, 1, 2, 3]),
  interleaved=read((2, 1, 2, 1), [0, 2, 1, 3]),
  shared=read((1, 1, 1, 4), [0, 1, 2, 3]),
)
stack.close()
"""


@pytest.mark.slow
def test_processes_read_every_token_of_an_epoch_once(tmp_path):
  """Two real processes with two devices each, over a whole epoch, on three meshes.

  Each device has its rows of the one global batch (asserted inside), also where a
  process's rows are not neighbours. Together the processes have each token of the
  corpus once. Where `tensor` spans both they share the sequences: each reads all,
  since halves would be two different batches.
  """
  dataset = load(small_config(tmp_path / "cache"))
  command = [sys.executable, "-c", _READ, str(tmp_path / "cache"), str(tmp_path)]
  args = ["--devices_per_process=2", f"--logs={tmp_path}", "--", *command]
  assert launch_local.main(args) == 0
  read = [np.load(tmp_path / f"{index}.npz") for index in range(2)]
  for name in ("apart", "interleaved"):
    rows = [part[name].shape[1] for part in read]
    assert rows[0] == rows[1]
    once_each(dataset, np.concatenate([part[name] for part in read], axis=1))
  assert not np.array_equal(read[0]["apart"], read[0]["interleaved"])
  np.testing.assert_array_equal(read[0]["shared"], read[1]["shared"])
  once_each(dataset, read[0]["shared"])


def once_each(dataset, rows) -> None:
  """The epoch's sequences, and none of the next one but what fills the last batch."""
  count = dataset.num_sequences("train")
  alone = dataset.train_batches(8, 0)
  batches = [next(alone) for _ in range(rows.shape[1] // 8)]
  alone.close()
  whole = np.stack(
    [np.concatenate([b[k] for b in batches]) for k in ("targets", "segment_ids")]
  )
  have, want = (
    sorted(row.tobytes() for row in np.moveaxis(stack, 1, 0)) for stack in (rows, whole)
  )
  assert have == want
  epoch = whole[:, :count]
  targets = epoch[0][epoch[1] > 0]
  assert len(targets) == dataset.num_tokens("train")
  counts = np.bincount(targets, minlength=264)[:256]
  np.testing.assert_array_equal(counts, dataset.byte_counts("train"))
