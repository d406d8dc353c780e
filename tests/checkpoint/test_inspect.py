"""tools.inspect_checkpoint: the same state gives the same sha256, and no other does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from moejax.checkpoint import fingerprint
from moejax.checkpoint import inspect as checkpoint_inspect
from moejax.checkpoint.manager import DIRECTORY
from moejax.errors import UserError
from tests.checkpoint import test_manager as helpers

ROOT = Path(__file__).parents[2]


def save(workdir, state, step=1):
  checkpoints = helpers.open_checkpoints(workdir)
  checkpoints.save(step, state, position={"step": step})
  assert checkpoints.close()


@pytest.mark.parametrize("optimizer", list(helpers.OPTIMIZERS))
def test_sha256_is_that_of_the_live_state(tmp_path, optimizer):
  """Named tuples in memory and lists on disk: the same names, order and bytes."""
  state = helpers.make_state(optimizer)
  save(tmp_path, state)
  report = checkpoint_inspect.inspect(tmp_path)
  hashed = {key: state[key] for key in checkpoint_inspect.HASHED}
  assert report["sha256"] == fingerprint.sha256(hashed)
  assert report["sha256_all"] == fingerprint.sha256(state)
  assert report["damage"] == []
  assert set(report["arrays"]) == set(fingerprint.named_leaves(state))
  assert report["arrays"]["key"]["dtype"] == "key<fry>"


def test_sha256_does_not_depend_on_the_mesh_and_does_on_every_bit(tmp_path):
  """Sharded or not is the same; one bit of one moment, or a negative zero, is not."""
  state = helpers.make_state()
  save(tmp_path / "a", state)
  spread = helpers.make_state(mesh=helpers.make_mesh((4, 2)))
  save(tmp_path / "b", spread)
  a, b = (checkpoint_inspect.inspect(tmp_path / name) for name in "ab")
  assert a["sha256"] == b["sha256"]
  assert b["arrays"]["params.moe.w_in"]["sharding"] == (
    "(-, expert, fsdp) on fsdp=4,expert=2"
  )
  zero = {"params": {"w": jnp.zeros(3)}}
  minus = {"params": {"w": -jnp.zeros(3)}}
  assert fingerprint.sha256(zero) != fingerprint.sha256(minus)


def test_equal_experts_have_equal_fingerprints_wherever_they_stand(tmp_path):
  """Experts of a layer exchanged: the list is exchanged, and the sha256 is another."""
  state = helpers.make_state()
  save(tmp_path / "a", state)
  experts = state["params"]["moe"]["w_in"]
  swapped = experts.at[0, 0].set(experts[0, 1]).at[0, 1].set(experts[0, 0])
  save(
    tmp_path / "b",
    state | {"params": state["params"] | {"moe": {"w_in": swapped}}},
  )
  a, b = (checkpoint_inspect.inspect(tmp_path / name) for name in "ab")
  first = a["experts"]["params.moe.0"]
  assert len(set(first)) == 4
  assert b["experts"]["params.moe.0"] == [first[1], first[0], *first[2:]]
  assert b["experts"]["params.moe.1"] == a["experts"]["params.moe.1"]
  assert a["sha256"] != b["sha256"]


def test_damage_is_reported(tmp_path):
  """Arrays that are not those of the meta file are named; unreadable ones refused."""
  helpers.save_steps(tmp_path, [1, 2])
  one, two = (tmp_path / DIRECTORY / step / "meta" / "metadata" for step in "12")
  two.write_bytes(one.read_bytes())
  report = checkpoint_inspect.inspect(tmp_path)
  assert "params.moe.w_in changed" in " ".join(report["damage"])
  (tmp_path / DIRECTORY / "2" / "state" / "manifest.ocdbt").unlink()
  with pytest.raises(UserError, match=r"2 is damaged: .* Choose another --step"):
    checkpoint_inspect.inspect(tmp_path)


def test_the_command_prints_one_sha256_line(tmp_path):
  """What scripts rely on: the flags, one line of hex, exit codes 0 and 2."""
  save(tmp_path, helpers.make_state())
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}

  def command(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "tools.inspect_checkpoint", *arguments],
      capture_output=True,
      text=True,
      cwd=ROOT,
      env=environment,
    )

  done = command(f"--workdir={tmp_path}", "--step=1")
  assert done.returncode == 0, done.stderr
  lines = [line for line in done.stdout.splitlines() if line.startswith("sha256 ")]
  report = checkpoint_inspect.inspect(tmp_path)
  assert lines == [f"sha256 {report['sha256']}"]
  assert checkpoint_inspect.render(report) == done.stdout.rstrip("\n")
  assert json.loads(json.dumps(report))["sha256"] == report["sha256"]
  done = command(f"--workdir={tmp_path}", "--step=7")
  assert done.returncode == 2 and "--step=7" in done.stderr
