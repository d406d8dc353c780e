"""A job that `launch` submits to a real Slurm: `make test-slurm`."""

import functools
import json
import os
import pathlib
import signal
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


@pytest.fixture(scope="module")
def calm(cluster, tmp_path_factory) -> pathlib.Path:
  """The directory of a run that nobody disturbed."""
  place = tmp_path_factory.mktemp("calm")
  launch(cluster, place, place / "run")
  wait(lambda: not ask(cluster, "squeue", "-h"))
  assert steps(place / "run")[-1] == 120
  return place / "run"


def launch(
  cluster,
  place: pathlib.Path,
  workdir: pathlib.Path,
  *settings: str,
  sbatch: tuple[str, ...] = (),
) -> str:
  """Submits two tasks from `place`, and returns the job's number.

  With flags of sbatch, the script is only printed by `launch`, and submitted with them.
  """
  (place / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
  python = place / ".venv" / "bin" / "python"
  if not python.exists():
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
  words = [sys.executable, "-m", "moejax.cli.main", "launch", "--target=slurm"]
  words += ["--topology=cpu:2", f"--workdir={workdir}", "--slurm.time=10"]
  words += [] if sbatch else ["--submit"]
  words += [f"--config.{setting}" for setting in SMALL + settings]
  run = functools.partial(subprocess.run, cwd=place, capture_output=True, text=True)
  done = run(words, env=cluster)
  assert done.returncode == 0, done.stderr
  if sbatch:
    script = done.stdout[done.stdout.index("#!") :]
    done = run(["sbatch", *sbatch], env=cluster, input=script)
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


def finish_after_requeue(cluster, job: str, workdir: pathlib.Path) -> None:
  # Requeued jobs wait for a moment, which is Slurm's own.
  wait(lambda: "PENDING" in ask(cluster, "squeue", "-h", "-o", "%T"))
  assert steps(workdir)[-1] < 120
  ask(cluster, "scontrol", "update", f"JobId={job}", "StartTime=now")
  wait(lambda: not ask(cluster, "squeue", "-h"))


def task(job: str, index: int) -> int:
  """Returns the process of a job's task."""
  wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={index}".encode()}
  for place in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      told = set((place / "environ").read_bytes().split(b"\0"))
      command = (place / "cmdline").read_bytes()
    except OSError:
      continue
    if wanted <= told and b"moejax.cli.main" in command and b"srun" not in command:
      return int(place.name)
  raise AssertionError(f"job {job} has no task {index}")


def test_two_tasks_are_preempted_requeued_and_end_as_if_undisturbed(
  cluster, calm, tmp_path
):
  """SIGTERM in the middle: both save, the script requeues the job, and it resumes.

  The losses of all steps are those of a job that nobody disturbed, bit for bit.
  """
  torn = tmp_path / "torn"
  job = launch(cluster, tmp_path, torn)
  wait(lambda: steps(torn) and steps(torn)[-1] >= 10)
  ask(cluster, "scancel", "--signal=TERM", job)
  finish_after_requeue(cluster, job, torn)
  assert steps(torn) == steps(calm)
  np.testing.assert_array_equal(losses(torn), losses(calm))


def test_a_killed_task_ends_the_other_and_the_job_is_requeued(cluster, calm, tmp_path):
  """SIGKILL of one, as by the kernel for want of memory: the other names it and leaves,
  the script requeues the job, and it ends with the losses of an undisturbed one."""
  torn = tmp_path / "torn"
  job = launch(cluster, tmp_path, torn)
  wait(lambda: (torn / "checkpoints" / "30").exists())
  os.kill(task(job, 1), signal.SIGKILL)
  finish_after_requeue(cluster, job, torn)
  log = next(tmp_path.glob(f"*-{job}.log")).read_text()
  assert "error: process 1 (" in log and "was lost" in log
  assert steps(torn) == steps(calm)
  np.testing.assert_array_equal(losses(torn), losses(calm))


def test_another_number_of_tasks_is_refused_and_not_requeued(cluster, tmp_path):
  """One task for a mesh of two devices: one line, before anything is written."""
  workdir = tmp_path / "one"
  job = launch(cluster, tmp_path, workdir, sbatch=("--ntasks-per-node=1",))
  wait(lambda: not ask(cluster, "squeue", "-h"))
  log = next(tmp_path.glob(f"*-{job}.log")).read_text()
  errors = [line for line in log.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1 and "--config.mesh" in errors[0]
  assert "Traceback" not in log and not workdir.exists()


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
