"""A whole run in a bucket: it ends like one on a disk."""

import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.run import claim, results, writers
from moejax.run.emergency_dir import Wish
from moejax.run.files import DIRECTORY, list_steps
from moejax.storage import errors as storage_errors
from moejax.storage import lease
from moejax.storage.paths import run_path
from moejax.train import finish, loop
from tests.train.conftest import Killed, kill_at, tiny_config


def train(workdir, num_steps, cache_dir, **kwargs):
  config = tiny_config(num_steps=num_steps, checkpoint_every=4)
  config.data.cache_dir = cache_dir
  config.train.tensorboard, config.train.sample = True, False
  return loop.train(
    config, workdir, devices=jax.devices()[:1], stream=io.StringIO(), **kwargs
  )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, compilation_cache, cache_dir):
  """The states at the end of eight steps: on a disk, and in a bucket in two parts."""
  ended = []

  def end(run, reporter):
    ended.append(jax.device_get({k: run.state[k] for k in ("params", "opt_state")}))
    return {"status": "done", "exit_code": 0}

  disk, bucket = tmp_path_factory.mktemp("disk"), run_path("gs://bucket/runs/whole")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(finish, "finish", end)
    train(disk, 8, cache_dir)
    train(bucket, 4, cache_dir)
    train(bucket, 8, cache_dir)
  return disk, bucket, ended


def test_a_resumed_run_in_a_bucket_ends_like_a_whole_one_on_a_disk(runs):
  """Parameters, moments and logged losses, bit for bit."""
  disk, bucket, (whole, _, resumed) = runs
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)
  there, here = (writers.read(w / writers.METRICS_FILE) for w in (bucket, disk))
  assert [line["step"] for line in there] == list(range(1, 9))
  for name in ("loss", "grad_norm", "learning_rate"):
    assert [line[name] for line in there] == [line[name] for line in here]


def test_a_run_writes_all_that_it_writes_on_a_disk(runs):
  """Config, provenance, tokenizer, event files and checkpoints; the lease is free."""
  disk, bucket, _ = runs
  names = {p.name for p in bucket.iterdir()} - {".lease", ".lease.clock"}
  assert names - {"metrics"} == {p.name for p in disk.iterdir()} - {"metrics.jsonl"}
  assert list_steps(bucket / DIRECTORY) == list_steps(disk / DIRECTORY) == [4, 8]
  assert json.loads((bucket / ".lease").read_text())["released"]
  config = json.loads((bucket / "config.json").read_text())
  assert config["train"]["num_steps"] == 8


def test_a_finished_run_evaluates_and_draws_in_its_bucket(runs, cache_dir):
  """The end of a run; a third start only reports it."""
  _, bucket, _ = runs
  done = train(bucket, 8, cache_dir)
  assert done["status"] == "done"
  assert results.read(bucket / "eval.json")["step"] == 8
  assert (bucket / "report.png").read_bytes().startswith(b"\x89PNG")
  assert train(bucket, 8, cache_dir)["status"] == "already_done"


def test_a_new_run_starts_from_one_in_a_bucket(runs, tmp_path, cache_dir, monkeypatch):
  """--init_from=gs://: the parameters of the source, read into a run on a disk."""
  _, bucket, (_, _, resumed) = runs
  started = []

  def fit(run, *_):
    started.append(jax.device_get(run.state["params"]))
    return 0

  monkeypatch.setattr(loop, "fit", fit)
  monkeypatch.setattr(finish, "finish", lambda *_: {"exit_code": 0})
  train(tmp_path / "new", 4, cache_dir, init_from=str(bucket))
  jax.tree.map(np.testing.assert_array_equal, started[0], resumed["params"])
  origin = json.loads((tmp_path / "new" / "run.json").read_text())
  assert origin["init_from"] == str(bucket)


def test_a_second_live_run_is_refused_before_it_reads_text(folder, monkeypatch):
  """One line names the holder, and the first run's lease stays."""
  monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
  monkeypatch.setattr(lease, "_machine", lambda: "")
  claim.lock(folder)
  held = claim._leases.pop(str(folder))
  with pytest.raises(UserError, match="in use by another live run: process"):
    train(folder, 4, "/nowhere/at/all")
  assert not json.loads((folder / ".lease").read_text())["released"]
  held.release()


def test_a_bucket_that_is_not_there_is_named():
  """Also where an empty listing would look like an empty folder."""
  with pytest.raises(UserError, match="gs://missing/run: there is no bucket missing"):
    storage_errors.reach(run_path("gs://missing/run"))


def command(name, *flags):
  return subprocess.run(
    [sys.executable, "-m", f"experiments.{name}", *flags],
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("program", "flags", "words"),
  [
    ("train", ["--workdir=gs://missing/run"], "there is no bucket missing"),
    ("train", ["--workdir=s3://bucket/run"], "only gs:// buckets are supported"),
    ("analyze", ["--workdir=gs://bucket/nothing", "--out=o"], "does not exist"),
    ("profile", ["--workdir=gs://bucket/run"], "must be a path on a disk"),
    ("generate", ["--workdir=gs://bucket/nothing"], "does not exist"),
    (
      "train",
      ["--workdir=gs://bucket/run", "--config.data.cache_dir=gs://bucket/cache"],
      "must be a path on a disk",
    ),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(program, flags, words):
  """Nothing is compiled, and nothing is written."""
  done = command(program, *flags)
  assert done.returncode == 2
  assert words in done.stderr
  assert "Traceback" not in done.stderr
  errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1


def test_emergency_checkpoints_stand_beside_a_bucket(
  runs, states, tmp_path, cache_dir, monkeypatch
):
  """The bucket has step 4, this machine 3 and 6: the same machine goes on from 6.

  Killed again, the run moves to a machine with an empty disk, and goes on from the
  bucket's 4. It ends like the run on a disk, bit for bit, and leaves nothing local.
  """
  workdir = run_path("gs://bucket/runs/emergency")

  def go_on(machine: str):
    wish = Wish(directory=str(tmp_path / machine), every=3)
    return train(workdir, 8, cache_dir, emergency=wish)

  def left(machine: str) -> list[str]:
    return sorted(path.name for path in (tmp_path / machine).glob("*/process_0/[0-9]*"))

  with monkeypatch.context() as patch:
    kill_at(patch, 7)
    for _ in range(2):
      with pytest.raises(Killed):
        go_on("first")
      assert list_steps(workdir / DIRECTORY) == [4]
      assert left("first") == ["3", "6"]
  assert go_on("second")["start"] == 4
  jax.tree.map(np.testing.assert_array_equal, runs[2][0], states[0])
  assert left("second") == []
