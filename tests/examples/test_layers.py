"""The layer in models of other people, as the examples have it: real processes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def printed(example: str) -> str:
  done = subprocess.run(
    [sys.executable, "-m", f"examples.{example}"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_in_a_plain_nnx_training_loop():
  """It learns, and the bias balances: no expert has twice its share at step 40."""
  out = printed("nnx_training")
  loads = re.findall(r"step 40: .*expert \[([ 0-9]+)\]", out)[0].split()
  assert max(map(int, loads)) < 2 * 8 * 32 * 2 / 8
  assert float(out.split()[-1]) < 0.2


def test_in_a_linen_model():
  """Its parameters are among the model's, each with a gradient."""
  out = printed("linen_model")
  for name in ("w_in", "w_out", "weight"):
    assert re.search(rf"\['moe'\].*'{name}'", out)


@pytest.mark.slow
def test_on_eight_devices():
  """Experts over four of them by all-to-all, the result that of one."""
  out = printed("sharded_layer")
  assert int(out.split()[0]) >= 2
  assert "'expert': 4" in out and float(out.split()[-1]) < 1e-5
