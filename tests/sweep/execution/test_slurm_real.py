"""A sweep on a real Slurm, which is started in a temporary directory: `make test-slurm`.

One node with two CPUs, so two runs of one task each run at once and a third waits.
"""

import contextlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moejax.sweep.execution import directory, slurm, states
from moejax.sweep.execution.states import State
from tests import slurm_cluster
from tools import kill_loop

ROOT = pathlib.Path(__file__).parents[3]
SECONDS = 600.0
REBOOT_SECONDS = 15.0
"""A job that is younger is not missed by Slurm when its node comes back without it."""

LONG = {"num_steps": 400, "checkpoint_every": 50}

pytestmark = slurm_cluster.MARKS


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  """Environment variables with which Slurm's programs find it."""
  with slurm_cluster.started(tmp_path_factory.mktemp("slurm")) as environment:
    yield environment


class Cluster:
  """Starts sweeps, and asks Slurm."""

  def __init__(self, environment, cache, scratch):
    self.environment = environment | {
      "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    self.cache, self.scratch = cache, scratch

  def ask(self, *command: str) -> str:
    return subprocess.run(
      command,
      env=self.environment,
      cwd=self.scratch,
      stdout=subprocess.PIPE,
      check=True,
      text=True,
    ).stdout

  def start(self, workdir, **given) -> subprocess.Popen[str]:
    """Starts a sweep; see tests/sweep/execution/slurm_sweep.py for what may be given."""
    options = self.scratch / f"{time.monotonic_ns()}.json"
    options.write_text(json.dumps(given))
    module = "tests.sweep.execution.slurm_sweep"
    return subprocess.Popen(
      [sys.executable, "-m", module, str(workdir), str(self.cache), str(options)],
      cwd=ROOT,
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, workdir, **given) -> tuple[int, str, str]:
    """The exit code of a sweep, and what it printed on stdout and stderr."""
    with self.start(workdir, **given) as process:
      out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err

  def job(self, workdir) -> str:
    """The id of the only submission, once it has one."""
    return until(lambda: next((s.job for s in slurm.submissions(workdir) if s.job), None))

  def queue(self) -> list[str]:
    return self.ask("squeue", "-h", "-r", "-o", "%i %T").splitlines()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  """The cache of data and programs of all tests."""
  return tmp_path_factory.mktemp("cache")


@pytest.fixture
def sweeps(cluster, shared, tmp_path):
  made = Cluster(cluster, shared, tmp_path)
  yield made
  made.ask("scancel", "--user=root")
  until(lambda: not made.queue())


@pytest.fixture(scope="module")
def calm(cluster, shared, tmp_path_factory):
  """The directory of a run of LONG that nothing disturbed, without Slurm."""
  place = tmp_path_factory.mktemp("calm")
  local = {"executor": "local"}
  made = Cluster(cluster, shared, place)
  code, _, err = made.run(place / "s", train=LONG, options=local)
  assert code == 0, err
  return only_run(place / "s")


def until(question, seconds: float = 180.0):
  """The first true answer."""
  deadline = time.monotonic() + seconds
  while not (answer := question()):
    assert time.monotonic() < deadline, "it did not come to pass in time"
    time.sleep(0.1)
  return answer


def only_run(workdir) -> pathlib.Path:
  (run,) = directory.run_directories(workdir)
  return run


def has_logged(workdir, steps: int) -> bool:
  paths = workdir.glob("runs/*/metrics.jsonl")
  return any(len(path.read_text().splitlines()) >= steps for path in paths)


def attempts(run) -> list[dict]:
  return states.read_record(run)["attempts"]


def exit_codes(run) -> list[int | None]:
  return [attempt["exit_code"] for attempt in attempts(run)]


def kill_job(conf: str, job: str) -> None:
  """Ends everything on the node that belongs to a job, as a crash does it.

  Args:
    conf: SLURM_CONF of the cluster, since another one may have a job of that number.
    job: id of the job.
  """
  pids, number = [], job.encode()
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      variables = (path / "environ").read_bytes().split(b"\0")
      is_step = (path / "cmdline").read_bytes().startswith(b"slurmstepd: [%s." % number)
      is_task = b"SLURM_JOB_ID=" + number in variables
      if f"SLURM_CONF={conf}".encode() in variables and (is_step or is_task):
        pids.append(int(path.name))
  assert pids
  for pid in pids:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)


def test_an_array_ends_though_its_scheduler_is_killed_and_nothing_runs_twice(sweeps):
  """Four runs, two at once; a second call waits for the jobs that it finds queued."""
  workdir = sweeps.scratch / "s"
  with sweeps.start(workdir, points=4) as process:
    job = sweeps.job(workdir)
    assert until(lambda: any("PENDING" in line for line in sweeps.queue()))
    process.kill()
  code, out, err = sweeps.run(workdir, points=4)
  assert code == 0, err
  assert f"queued ({job}_3" in out and out.endswith("4 runs: 4 done\n")
  assert [s.job for s in slurm.submissions(workdir)] == [job]
  ids = [[a["job"] for a in attempts(run)] for run in directory.run_directories(workdir)]
  assert ids == [[f"{job}_{index}"] for index in range(4)]
  code, out, _ = sweeps.run(workdir, points=4)
  assert code == 0 and len(slurm.submissions(workdir)) == 1


@pytest.mark.parametrize("how", ["signal", "preemption"])
def test_a_preempted_run_is_requeued_and_ends_as_if_undisturbed(sweeps, calm, how):
  """Parameters, optimizer state and every logged loss, bit for bit.

  Once USR2 comes, as before a time limit; once another job takes the CPUs, and Slurm
  sends SIGTERM and waits.
  """
  workdir = sweeps.scratch / "s"
  with sweeps.start(workdir, train=LONG) as process:
    until(lambda: has_logged(workdir, 60))
    job = sweeps.job(workdir)
    if how == "signal":
      sweeps.ask("scancel", "--signal=USR2", job)
    else:
      sweeps.ask("sbatch", "-p", "urgent", "-n", "2", "--wrap", "sleep 2")
    out, err = process.communicate(timeout=SECONDS)
  assert process.returncode == 0, err
  assert f"queued ({job}, BeginTime)" in out
  run = only_run(workdir)
  assert exit_codes(run) == [143, 0]
  assert {attempt["job"] for attempt in attempts(run)} == {job}
  assert kill_loop.compare(calm, run) == []


def is_told_to_stop(pid: int) -> bool:
  """Whether SIGTERM waits for a process that sleeps, or woke it.

  With a signal of `#SBATCH --signal`, Slurm also sends SIGCONT.
  """
  try:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
  except FileNotFoundError:
    return True
  (mask,) = re.findall(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)
  (state,) = re.findall(r"^State:\s*(\w)", status, re.MULTILINE)
  return state != "T" or bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


def test_a_run_longer_than_the_time_limit_goes_on_in_another_job(sweeps, calm):
  """The run sleeps until Slurm has it stopped by the limit.

  Two minutes: on a busy machine the start alone takes one.
  """
  workdir = sweeps.scratch / "s"
  limits = {"time": "2", "signal_seconds": 5}
  with sweeps.start(workdir, train=LONG, slurm=limits) as process:
    until(lambda: has_logged(workdir, 60))
    pid = attempts(only_run(workdir))[-1]["pid"]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.0)  # It takes effect a moment later.
    until(lambda: is_told_to_stop(pid))
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGCONT)
    _, err = process.communicate(timeout=SECONDS)
  assert process.returncode == 0, err
  run = only_run(workdir)
  assert len(exit_codes(run)) >= 2
  assert set(exit_codes(run)[:-1]) == {143} and exit_codes(run)[-1] == 0
  assert len(slurm.submissions(workdir)) == 1
  assert kill_loop.compare(calm, run) == []


def test_a_node_that_dies_leaves_a_run_that_the_next_call_resumes(sweeps, calm):
  """SIGKILL for Slurm's own processes of the job, the task and the run."""
  workdir = sweeps.scratch / "s"
  with sweeps.start(workdir, train=LONG) as process:
    until(lambda: has_logged(workdir, 60))
    sweeps.ask("scontrol", "update", f"JobId={sweeps.job(workdir)}", "Requeue=0")
    conf = sweeps.environment["SLURM_CONF"]
    kill_job(conf, sweeps.job(workdir))
    time.sleep(REBOOT_SECONDS)
    sweeps.ask(
      "bash", str(slurm_cluster.SCRIPT), "reboot", str(pathlib.Path(conf).parent)
    )
    _, err = process.communicate(timeout=SECONDS)
  run = only_run(workdir)
  assert process.returncode == 1
  assert "interrupted" in err
  assert states.examine(run).state is State.INTERRUPTED
  code, _, err = sweeps.run(workdir, train=LONG)
  assert code == 0, err
  assert len(slurm.submissions(workdir)) == 2
  assert kill_loop.compare(calm, run) == []


def test_ctrl_c_leaves_the_jobs_and_says_how_to_cancel_them(sweeps, calm):
  """The printed command stops the run, which saves first and is not requeued."""
  workdir = sweeps.scratch / "s"
  with sweeps.start(workdir, train=LONG) as process:
    until(lambda: has_logged(workdir, 20))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
  job, run = sweeps.job(workdir), only_run(workdir)
  assert process.returncode == 130
  assert f"scancel {job}" in err
  assert sweeps.queue() == [f"{job} RUNNING"]
  sweeps.ask(*shlex.split(err.rpartition("cancel them: ")[2]))
  until(lambda: not sweeps.queue())
  assert exit_codes(run) == [143]
  assert states.examine(run).state is State.INTERRUPTED
  code, _, err = sweeps.run(workdir, train=LONG)
  assert code == 0, err
  assert kill_loop.compare(calm, run) == []


def test_a_run_of_two_tasks_is_one_job_and_computes_the_same(sweeps):
  """Two processes meet through Slurm, with gloo; sums may differ in order."""
  one, two = sweeps.scratch / "one", sweeps.scratch / "two"
  assert sweeps.run(one, mesh=-1)[0] == 0
  code, _, err = sweeps.run(two, mesh=-1, slurm={"tasks_per_node": 2})
  assert code == 0, err
  assert (only_run(two) / "train.1.log").exists()
  first, second = (kill_loop.losses(only_run(path)) for path in (one, two))
  assert list(first) == list(second) == list(range(1, 7))
  np.testing.assert_allclose(list(first.values()), list(second.values()), rtol=1e-5)


def test_two_tasks_are_requeued_together(sweeps):
  """Both save at the same step, and the resumed run logs what a whole one does."""
  train, slurm_options = {"num_steps": 200}, {"tasks_per_node": 2}
  calm, stormy = sweeps.scratch / "calm", sweeps.scratch / "stormy"
  given = {"mesh": -1, "train": train, "slurm": slurm_options}
  assert sweeps.run(calm, **given)[0] == 0
  with sweeps.start(stormy, **given) as process:
    until(lambda: has_logged(stormy, 40))
    sweeps.ask("scancel", "--signal=USR2", sweeps.job(stormy))
    _, err = process.communicate(timeout=SECONDS)
  assert process.returncode == 0, err
  assert exit_codes(only_run(stormy)) == [143, 0]
  assert kill_loop.compare(only_run(calm), only_run(stormy)) == []


def test_a_failed_run_is_named_with_its_log_and_retried_only_when_told(sweeps):
  """Two processes with a mesh for one device: the run refuses its config."""
  workdir = sweeps.scratch / "s"
  given = {"mesh": 1, "slurm": {"tasks_per_node": 2}}
  code, _, err = sweeps.run(workdir, **given)
  assert code == 1
  assert "num_experts=2,seed=0 failed (exit code 2)" in err
  assert "2 device(s) cannot be divided this way" in err and "--retry_failed" in err
  assert sweeps.run(workdir, **given)[0] == 1
  assert len(slurm.submissions(workdir)) == 1
  given["slurm"] = {}
  code, _, err = sweeps.run(workdir, **given, options={"retry_failed": True})
  assert code == 0, err
  assert len(slurm.submissions(workdir)) == 2


def test_a_job_that_ends_before_its_run_begins_is_named_with_what_it_printed(sweeps):
  """A line of --slurm.setup that fails; without Slurm's word for it."""
  workdir = sweeps.scratch / "s"
  setup = ["module() { echo no such module: $1 >&2; exit 1; }", "module cuda"]
  code, _, err = sweeps.run(workdir, slurm={"setup": setup})
  assert code == 1
  assert "num_experts=2,seed=0 failed" in err and "no such module: cuda" in err


def test_finished_runs_are_evaluated_by_jobs_and_each_only_once(sweeps):
  """Its jobs leave the runs' records alone."""
  workdir = sweeps.scratch / "s"
  assert sweeps.run(workdir, points=2)[0] == 0
  options = {"evaluate": True, "eval_capacity_factor": "1,none"}
  code, out, err = sweeps.run(workdir, points=2, options=options)
  assert code == 0, err
  assert "evaluated (2 of 2)" in out
  code, out, _ = sweeps.run(workdir, points=2, options=options)
  assert code == 0 and "2 of 2 runs have this evaluation already" in out
  kinds = [submission.kind for submission in slurm.submissions(workdir)]
  assert kinds == ["train", "evaluate validation 1,none"]
  for run in directory.run_directories(workdir):
    assert exit_codes(run) == [0]


def test_what_slurm_refuses_is_one_line_and_submits_nothing(sweeps):
  """The partitions of mini_slurm.sh: short allows ten minutes."""
  workdir = sweeps.scratch / "s"
  refused = [
    ({"partition": "shrt"}, "--slurm.partition=shrt", "Did you mean short?"),
    ({"partition": "short", "time": "11"}, "--slurm.time=11", "at most 10:00"),
    ({"nodes": 2}, "Slurm refuses the jobs", "Node count specification invalid"),
    ({"constraint": "a100"}, "Slurm refuses the jobs", "Invalid feature specification"),
  ]
  for given, *words in refused:
    code, _, err = sweeps.run(workdir, slurm=given)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert all(word in err for word in words), err
  assert slurm.submissions(workdir) == [] and sweeps.queue() == []


def test_a_local_scheduler_does_not_start_what_slurm_will_run(sweeps):
  """Nor prints its command; --noslurm.wait has left before the job ended."""
  workdir = sweeps.scratch / "s"
  code, out, _ = sweeps.run(workdir, train=LONG, slurm={"wait": False})
  assert code == 0 and "Submitted 1 runs as job" in out
  for executor in ("local", "print"):
    code, _, err = sweeps.run(workdir, train=LONG, options={"executor": executor})
    assert code == 2 and f"scancel {sweeps.job(workdir)}" in err
