"""A job that `launch` submits to a real Slurm: `make test-slurm`."""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import slurm_cluster

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 600.0

pytestmark = slurm_cluster.MARKS


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  """Environment variables with which Slurm's programs find it."""
  place = tmp_path_factory.mktemp("slurm")
  with slurm_cluster.started(place) as environment:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(place / "xla")}
    yield environment | cache


def launch(cluster, place: pathlib.Path, workdir: pathlib.Path, *settings: str) -> str:
  """Submits two tasks from `place`, and returns the job's number."""
  (place / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
  python = place / ".venv" / "bin" / "python"
  if not python.exists():
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
  words = [sys.executable, "-m", "moejax.cli.main", "launch", "--target=slurm"]
  words += ["--topology=cpu:2", f"--workdir={workdir}", "--slurm.time=10", "--submit"]
  words += [f"--config.{setting}" for setting in SMALL + settings]
  done = subprocess.run(words, cwd=place, env=cluster, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout.split()[-1]


SMALL = (
  "model.num_layers=2",
  "model.width=32",
  "model.hidden=32",
  "moe.hidden=32",
  "moe.num_experts=4",
  "mesh.expert=2",
  "mesh.data=1",
  "data.tokenizer=bytes",
  "data.sequence_length=32",
  "train.batch_size=4",
  "moe.group_size=0",
  "train.num_steps=120",
  "train.checkpoint_every=30",
  "train.log_every=2",
  "train.eval_every=120",
  "train.eval_batches=1",
)


def ask(cluster, *command: str) -> str:
  return subprocess.run(
    command, env=cluster, capture_output=True, text=True, check=True
  ).stdout


def wait(question, seconds: float = SECONDS):
  deadline = time.monotonic() + seconds
  while not (answer := question()):
    assert time.monotonic() < deadline
    time.sleep(0.2)
  return answer


def steps(workdir: pathlib.Path) -> list[int]:
  file = workdir / "metrics.jsonl"
  lines = file.read_text().splitlines() if file.exists() else []
  return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def losses(workdir: pathlib.Path) -> list[float]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["loss"] for line in lines]


def test_two_tasks_are_preempted_requeued_and_end_as_if_undisturbed(cluster, tmp_path):
  """SIGTERM in the middle: both save, the script requeues the job, and it resumes.

  The losses of all steps are those of a job that nobody disturbed, bit for bit.
  """
  calm, torn = tmp_path / "calm", tmp_path / "torn"
  launch(cluster, tmp_path, calm)
  wait(lambda: not ask(cluster, "squeue", "-h"))
  assert steps(calm)[-1] == 120
  job = launch(cluster, tmp_path, torn)
  wait(lambda: steps(torn) and steps(torn)[-1] >= 10)
  ask(cluster, "scancel", "--signal=TERM", job)
  # Requeued jobs wait for a moment, which is Slurm's own.
  wait(lambda: "PENDING" in ask(cluster, "squeue", "-h", "-o", "%T"))
  assert steps(torn)[-1] < 120
  ask(cluster, "scontrol", "update", f"JobId={job}", "StartTime=now")
  wait(lambda: not ask(cluster, "squeue", "-h"))
  assert steps(torn) == steps(calm)
  np.testing.assert_array_equal(losses(torn), losses(calm))


def test_a_mistake_in_the_job_is_not_requeued(cluster, tmp_path):
  """Exit code 2 ends it: another start would say the same."""
  workdir = tmp_path / "wrong"
  launch(cluster, tmp_path, workdir)
  wait(lambda: steps(workdir))
  wait(lambda: not ask(cluster, "squeue", "-h"))
  # Another config in the same directory.
  job = launch(cluster, tmp_path, workdir, "train.seed=3")
  wait(lambda: not ask(cluster, "squeue", "-h"))
  log = next(tmp_path.glob(f"*-{job}.log")).read_text()
  assert "train.seed" in log
