"""tools.kill_loop: it finds differences, and a killed run has none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.errors import UserError
from tests.checkpoint import test_manager as helpers
from tools import kill_loop

ROOT = Path(__file__).parents[2]


def finished(workdir, *, seed=0, losses=(2.0, 1.0)):
  """What a run leaves that the comparison looks at."""
  checkpoints = helpers.open_checkpoints(workdir)
  checkpoints.save(2, helpers.make_state(seed=seed), position={"step": 2})
  checkpoints.close()
  records = [{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)]
  lines = "".join(json.dumps(r) + "\n" for r in records)
  (workdir / "metrics.jsonl").write_text(lines)
  return workdir


def test_a_different_bit_or_a_different_loss_is_found(tmp_path):
  """The proof must be able to fail: other parameters, and another logged loss."""
  calm = finished(tmp_path / "calm")
  assert kill_loop.compare(calm, finished(tmp_path / "same")) == []
  other = kill_loop.compare(calm, finished(tmp_path / "other", seed=1))
  assert "sha256 differs" in other and "sha256_all differs" in other
  late = kill_loop.compare(calm, finished(tmp_path / "late", losses=(2.0, 1.5)))
  assert late == ["the logged loss differs at 1 steps: [2]"]


def test_a_step_logged_twice_must_agree_with_itself(tmp_path):
  """Steps repeated after a kill are the same steps."""
  workdir = finished(tmp_path)
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"step": 2, "loss": 1.0}\n')
  assert kill_loop.losses(workdir) == {1: 2.0, 2: 1.0}
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"step": 2, "loss": 1.25}\n')
  with pytest.raises(UserError, match="two losses"):
    kill_loop.losses(workdir)


@pytest.mark.slow
def test_a_run_killed_three_times_ends_bit_identical(tmp_path):
  """After a checkpoint, during a save, and at a random moment."""
  done = subprocess.run(
    [sys.executable, "-m", "tools.kill_loop", "--kills=3", "--config.train.num_steps=60"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
  )
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  assert "identical after 3 kills" in done.stdout
