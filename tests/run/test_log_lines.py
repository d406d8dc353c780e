"""Logs of long runs: which steps have a line, how many, and how large they become."""

import numpy as np
import pytest

from moejax.config import Config
from moejax.run import disk, log_lines, writers


@pytest.mark.parametrize("log_every", [1, 3, 10])
def test_the_number_of_lines_is_that_of_the_steps_that_are_due(log_every, monkeypatch):
  """Counted one by one, for lengths around each doubling; never two at once."""
  monkeypatch.setattr(log_lines, "FULL", 16)
  due = [s for s in range(1, 64 * 16 + 2) if log_lines.is_due(s, log_every)]
  for steps in (1, 15, 16, 17, 47, 48, 49, 160, 161, 321, 1000, 1025):
    expected = sum(s <= steps for s in due)
    assert log_lines.num_lines(steps, log_every) == expected
  full = due[:16]
  assert full == list(range(log_every, 16 * log_every + 1, log_every))
  assert all(step % log_every == 0 for step in due)


def test_a_run_of_the_usual_length_has_a_line_wherever_the_config_says():
  """50,000 steps, each tenth logged; a million have a bounded number."""
  assert log_lines.num_lines(50_000, 10) == 5_000
  assert all(log_lines.is_due(step, 10) for step in range(10, 50_001, 10))
  assert log_lines.num_lines(10**6, 10) == 15_625
  assert log_lines.num_lines(10**6, 1) < 25_000


@pytest.mark.parametrize(("layers", "experts"), [(4, 8), (12, 64), (30, 128)])
def test_the_size_of_the_logs_is_foreseen(tmp_path, layers, experts):
  """What the writers make of one line, times the number of lines, within a factor."""
  config = Config()
  config.model.num_layers, config.moe.num_experts, config.moe.every = layers, experts, 1
  config.train.num_steps = config.train.log_every = 1
  config.train.eval_every = 0
  load = np.full((layers, experts), 1.2345e-3)
  moe = {f"number_{i}": [1.2345] * layers for i in range(12)}
  moe["load" if load.size <= 1024 else "load_quantiles"] = load[:, :5].tolist()
  if load.size <= 1024:
    moe["load"] = load.tolist()
  values = {f"a_name_of_a_number_{i}": 1.23456789012345 for i in range(14)} | {"moe": moe}
  for writer in writers.make_writers(tmp_path, resume_step=0, tensorboard=True):
    for step in range(1, 21):
      writer.write(step, values)
    writer.close()
  files = [p for p in tmp_path.rglob("*") if p.is_file()]
  measured = sum(p.stat().st_size for p in files) / 20
  assert measured / 2 < log_lines.num_bytes(config) < 2 * measured


def test_the_checkpoints_of_a_run_are_counted():
  """Two newest, a best one and the one being written; fewer if it saves less often."""
  config = Config()
  config.train.num_steps, config.train.checkpoint_every = 1000, 250
  config.train.keep_last, config.train.keep_best = 2, 1
  assert disk.num_copies(config) == 4
  config.train.checkpoint_every = 0
  assert disk.num_copies(config) == 1
  assert disk.num_copies(config, begun=2) == 3
