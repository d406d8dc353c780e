"""A job that `launch` submits to a real Slurm: `make test-slurm`."""

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
SCRIPT = ROOT / "docs" / "launching" / "slurm.sbatch"
SECONDS = 600.0

pytestmark = slurm_cluster.MARKS


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  """Environment variables with which Slurm's programs find it."""
  place = tmp_path_factory.mktemp("slurm")
  with slurm_cluster.started(place) as environment:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(place / "xla")}
    yield environment | cache


@pytest.fixture(autouse=True)
def no_job_is_left(cluster):
  """Of a test that fails, for the next one."""
  yield
  ask(cluster, "scancel", "--user=root")
  wait(lambda: not ask(cluster, "squeue", "-h"))


@pytest.fixture(scope="module")
def calm(cluster, tmp_path_factory) -> pathlib.Path:
  """The directory of a run that nobody disturbed: what `launch --submit` submits."""
  place = tmp_path_factory.mktemp("calm")
  prepare(place)
  words = [sys.executable, "-m", "moejax.cli.main", "launch", "--target=slurm"]
  words += ["--topology=cpu:2", f"--workdir={place / 'run'}", "--slurm.time=10"]
  words += ["--submit", *(f"--config.{setting}" for setting in SMALL)]
  done = subprocess.run(words, cwd=place, env=cluster, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  wait(lambda: not ask(cluster, "squeue", "-h"))
  assert steps(place / "run")[-1] == 120
  return place / "run"


def prepare(place: pathlib.Path, python: str = sys.executable) -> None:
  """Makes a directory to submit from, with an interpreter where the script expects it."""
  (place / ".venv" / "bin").mkdir(parents=True)
  (place / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
  (place / ".venv" / "bin" / "python").chmod(0o755)
  (place / "configs").symlink_to(ROOT / "configs")


def submit(
  cluster,
  place: pathlib.Path,
  workdir: pathlib.Path,
  *settings: str,
  options: tuple[str, ...] = (),
  **environment: str,
) -> str:
  """Submits docs/launching/slurm.sbatch from `place`, and returns the job's number.

  Flags of sbatch and variables make it a job of two CPUs; its own flags, a small one.
  """
  if not (place / ".venv").exists():
    prepare(place)
  words = ["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=2", "--time=10"]
  words += ["--cpus-per-task=1", "--gpus-per-node=0", *options, str(SCRIPT)]
  words += [f"--workdir={workdir}"]
  words += [f"--config.{setting}" for setting in SMALL + settings]
  cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
  done = subprocess.run(
    words,
    cwd=place,
    env=cluster | cpu | environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def log(place: pathlib.Path, job: str) -> str:
  return (place / f"moejax-default-{job}.log").read_text()


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


def state(cluster, job: str) -> str:
  """What squeue says of a job; empty when it is over."""
  lines = ask(cluster, "squeue", "-h", "-o", "%i %T").splitlines()
  return dict(line.split() for line in lines).get(job, "")


def ended(cluster, job: str) -> str:
  """Waits for a job's end, and returns what Slurm says about it."""
  wait(lambda: not state(cluster, job))
  return ask(cluster, "scontrol", "show", "job", job)


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
  """A job of higher priority takes the node: both tasks save, and the job resumes.

  The losses of all steps are those of a job that nobody disturbed, bit for bit.
  """
  torn = tmp_path / "torn"
  job = submit(cluster, tmp_path, torn)
  wait(lambda: steps(torn) and steps(torn)[-1] >= 10)
  urgent = ("--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 3")
  ask(cluster, "sbatch", *urgent)
  wait(lambda: "Stopped at step" in log(tmp_path, job))
  assert steps(torn)[-1] < 120
  assert "Restarts=1" in ended(cluster, job)
  assert steps(torn) == steps(calm)
  np.testing.assert_array_equal(losses(torn), losses(calm))


def test_a_killed_task_ends_the_other_and_the_job_is_requeued(cluster, calm, tmp_path):
  """SIGKILL of one, as by the kernel for want of memory: the other names it and leaves
  with code 3, the script requeues the job, and it ends as an undisturbed one."""
  torn = tmp_path / "torn"
  job = submit(cluster, tmp_path, torn)
  wait(lambda: (torn / "checkpoints" / "30").exists())
  os.kill(task(job, 1), signal.SIGKILL)
  assert "Restarts=1" in ended(cluster, job)
  said = log(tmp_path, job)
  assert "error: process 1 (" in said and "was lost" in said
  assert "task 0: Exited with exit code 3" in said and "task 1: Killed" in said
  assert "at step 30." in said
  assert steps(torn) == steps(calm)
  np.testing.assert_array_equal(losses(torn), losses(calm))


def test_a_time_limit_is_no_end_and_scancel_is_one(cluster, tmp_path):
  """Before the limit both tasks save, and the job goes on where it was."""
  workdir = tmp_path / "long"
  limit = ("--time=2", "--signal=TERM@60")
  job = submit(cluster, tmp_path, workdir, "train.num_steps=9000", options=limit)
  wait(lambda: steps(workdir) and state(cluster, job) == "PENDING")
  saved = max(int(kept.name) for kept in (workdir / "checkpoints").glob("[0-9]*"))
  assert saved >= steps(workdir)[-1]  # No step is lost.
  wait(lambda: f"at step {saved}." in log(tmp_path, job))
  ask(cluster, "scancel", job)
  said = ended(cluster, job)
  assert "JobState=CANCELLED" in said and "Restarts=1" in said


def test_a_bug_in_one_task_is_not_requeued(cluster, tmp_path):
  """The code of srun is the highest of all tasks, so the other may not end with 3."""
  bug = "import signal; signal.signal(signal.SIGUSR2, lambda *_: 1 / 0)"
  (tmp_path / "bug" / "1").mkdir(parents=True)
  (tmp_path / "bug" / "1" / "sitecustomize.py").write_text(bug)
  # bug/1 is read by task 1 alone.
  prepare(
    tmp_path, f"env PYTHONPATH={tmp_path}/bug/$SLURM_PROCID:$PYTHONPATH {sys.executable}"
  )
  run = tmp_path / "run"
  job = submit(cluster, tmp_path, run, "train.num_steps=9000")
  wait(lambda: steps(run))
  os.kill(task(job, 1), signal.SIGUSR2)
  assert "Restarts=0" in (said := ended(cluster, job)) and "ExitCode=1:0" in said
  assert "ZeroDivisionError" in log(tmp_path, job)


@pytest.mark.parametrize(("number", "expert"), [(1, 2), (2, 4)])
def test_another_number_of_tasks_is_refused_and_not_requeued(
  cluster, tmp_path, number, expert
):
  """Than the mesh has devices: one line of each task, before anything is written."""
  workdir, mesh = tmp_path / "other", f"mesh.expert={expert}"
  options = (f"--ntasks-per-node={number}",)
  job = submit(cluster, tmp_path, workdir, mesh, options=options)
  assert "Restarts=0" in (said := ended(cluster, job)) and "ExitCode=2:0" in said
  said = log(tmp_path, job)
  errors = [line for line in said.splitlines() if line.startswith("error: ")]
  assert len(errors) == number and len(set(errors)) == 1
  assert f"--config.{mesh} --config.mesh.tensor=1: {number} device(s)" in errors[0]
  assert "Traceback" not in said and not workdir.exists()


def test_a_mistake_in_the_job_is_not_requeued(cluster, calm, tmp_path):
  """Exit code 2 ends it: another start would say the same."""
  job = submit(cluster, tmp_path, calm, "train.seed=3")  # Another config there.
  assert "Restarts=0" in (said := ended(cluster, job)) and "ExitCode=2:0" in said
  assert "--config.train.seed was 0 and is now 3" in log(tmp_path, job)


def test_a_job_that_always_fails_is_not_requeued_for_ever(cluster, tmp_path):
  """Slurm's own count of restarts, up to a number in the script or the environment."""
  prepare(tmp_path, "sh -c 'exit 3'")
  job = submit(cluster, tmp_path, tmp_path / "run", MOEJAX_MAX_RESTARTS="2")
  assert "Restarts=2" in (said := ended(cluster, job)) and "ExitCode=3:0" in said
  assert log(tmp_path, job).count("error: MOEJAX_MAX_RESTARTS=2: not queued again") == 1
