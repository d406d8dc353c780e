"""A run with emergency checkpoints goes on from the newest of both places."""

import jax
import numpy as np
import pytest

from moejax.run import writers
from moejax.run.emergency_dir import Wish
from moejax.train import loop
from tests.train.conftest import Killed, kill_at, tiny_config


@pytest.fixture
def config(cache_dir, compilation_cache):
  config = tiny_config(num_steps=6)
  config.data.cache_dir = cache_dir
  return config


def train(config, workdir, local=None, every=2):
  wish = None if local is None else Wish(directory=str(local), every=every)
  return loop.train(config, workdir, devices=jax.devices()[:1], emergency=wish)


def test_a_killed_run_goes_on_from_this_machine_s_disk(
  config, states, tmp_path, monkeypatch
):
  """Killed at step 5 of 6, with no checkpoint but the local ones of steps 2 and 4.

  It goes on from 4, ends bit for bit like the run that was not killed, has each step
  once in its log, and leaves nothing on the disk. Nothing was logged before the kill:
  the local checkpoint alone makes it the same run.
  """
  config.train.log_every = 6
  train(config, tmp_path / "whole")
  with monkeypatch.context() as patch:
    kill_at(patch, 5)
    with pytest.raises(Killed):
      train(config, tmp_path / "killed", tmp_path / "local")
  assert len(list((tmp_path / "local").glob("killed-*/process_0/[24]"))) == 2
  result = train(config, tmp_path / "killed", tmp_path / "local")
  assert result["start"] == 4
  jax.tree.map(np.testing.assert_array_equal, states[0], states[1])
  whole, killed = (
    writers.read(tmp_path / name / writers.METRICS_FILE) for name in ("whole", "killed")
  )
  assert [line["step"] for line in killed] == [line["step"] for line in whole] == [6]
  assert killed[0]["loss"] == whole[0]["loss"]
  assert list((tmp_path / "local").iterdir()) == []


def test_the_newer_of_both_places_wins(config, states, tmp_path, monkeypatch, caplog):
  """The run's own of step 3 against local ones of steps 2 and 4: one of them damaged."""
  config.train.checkpoint_every = 3
  with monkeypatch.context() as patch:
    kill_at(patch, 5)
    with pytest.raises(Killed):
      train(config, tmp_path / "run", tmp_path / "local")
  [newest] = (tmp_path / "local").glob("run-*/process_0/4")
  (newest / "meta" / "metadata").write_text("{}")
  assert train(config, tmp_path / "run", tmp_path / "local")["start"] == 3
  assert sum("is skipped" in r.getMessage() for r in caplog.records) == 1


def test_lines_that_a_full_disk_refused_come_back_with_the_state(
  config, states, tmp_path, monkeypatch
):
  """Full from the start, killed at step 5: the next process logs steps 1 to 4."""
  config.train.log_every = 1
  train(config, tmp_path / "whole")
  with monkeypatch.context() as patch:
    patch.setattr(writers.JsonlWriter, "_write", lambda *_, **__: None)
    kill_at(patch, 5)
    with pytest.raises(Killed):
      train(config, tmp_path / "killed", tmp_path / "local")
  assert writers.read(tmp_path / "killed" / writers.METRICS_FILE) == []
  assert train(config, tmp_path / "killed", tmp_path / "local")["start"] == 4
  whole, killed = (
    writers.read(tmp_path / name / writers.METRICS_FILE) for name in ("whole", "killed")
  )
  assert [line["step"] for line in killed] == [1, 2, 3, 4, 5, 6]
  assert [line["loss"] for line in killed] == [line["loss"] for line in whole]
