"""The table of collectives as a user calls for it."""

import json
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "tools.collectives", "--config=configs/default.py"]
SMALL = ("model.width=32", "moe.hidden=64", "moe.group_size=0", "data.sequence_length=32")


def call(*args: str) -> subprocess.CompletedProcess:
  settings = [f"--config.{setting}" for setting in SMALL]
  return subprocess.run(
    [*COMMAND, *settings, *args], capture_output=True, text=True, timeout=300
  )


def test_a_mesh_that_does_not_fit_is_refused():
  """Before any compile, with the flag named and exit code 2."""
  done = call("--devices=8", "--config.mesh.expert=3")
  assert done.returncode == 2 and "--config.mesh.expert=3" in done.stderr


@pytest.mark.slow
def test_experts_over_four_devices():
  """Two MoE layers of the default model: eight all-to-alls, each asked for."""
  done = call("--devices=8", "--config.mesh.expert=4", "--json")
  assert done.returncode == 0, done.stdout + done.stderr
  rows = json.loads(done.stdout)
  [exchange] = [row for row in rows if row["kind"] == "all-to-all"]
  assert exchange["count"] == 8 and exchange["axis"] == "expert"
  assert exchange["bytes_per_chip"] == 8 * exchange["bytes"] * 3 // 4
  assert all(row["purpose"] for row in rows)
