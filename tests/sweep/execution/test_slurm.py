"""Jobs of a sweep, without a Slurm: what the queue means, and what is submitted.

test_slurm_real.py runs a real one.
"""

import json
import os
import pathlib
import pickle

import pytest

from moejax.errors import UserError
from moejax.sweep.execution import (
  schedule,
  slurm,
  slurm_queue,
  states,
)
from moejax.sweep.execution import view as view_lib
from moejax.sweep.execution.local import Job
from moejax.sweep.execution.slurm_options import SlurmOptions
from moejax.sweep.execution.states import State
from tests.sweep.execution import runs
from tests.sweep.execution.slurm_answers import NAME, PREEMPTED, QUEUE


@pytest.fixture
def workdir(tmp_path):
  """A sweep of two runs, both in a submission that Slurm knows as job 1."""
  path = tmp_path / "sweep"
  for name in ("a", "b"):
    (path / "runs" / name).mkdir(parents=True)
  submitted(path)
  return path


def submitted(workdir, job="1", name=NAME, when=1.0) -> slurm.Submission:
  folder = workdir / slurm.FOLDER / name.removeprefix(slurm.PREFIX)
  folder.mkdir(parents=True)
  values = {"name": name, "kind": "train", "runs": ["a", "b"], "job": job, "time": when}
  (folder / slurm.FILE).write_text(json.dumps(values))
  return slurm.submissions(workdir)[-1]


def finish(run: pathlib.Path) -> None:
  """Leaves what a run of six steps leaves."""
  (run / "checkpoints" / "6").mkdir(parents=True)
  (run / "eval.json").write_text(json.dumps({"step": 6, "loss": 2.25}))
  (run / "config.json").write_text(json.dumps({"train": {"num_steps": 6}}))


def examine(workdir) -> dict[str, states.Status]:
  return slurm.examine(workdir, {name: workdir / "runs" / name for name in ("a", "b")})


def test_the_queue_is_read_as_squeue_prints_it():
  found = {job.id: job for job in slurm_queue.parse(QUEUE)}
  assert list(found) == ["1_2", "1_3", "2", "3", "1_0"]
  assert (found["1_2"].index, found["1_2"].reason) == (2, "Resources")
  assert (found["2"].index, found["2"].name) == (0, "moejax-20261128-101501-d4e5f6")
  assert [job.is_waiting for job in found.values()] == [True, True, True, True, False]


def test_a_preempted_job_is_told_from_a_cancelled_one():
  assert slurm_queue.is_preempted(PREEMPTED)
  cancelled = PREEMPTED.replace("PreemptTime=2026-11-28T09:11:04", "PreemptTime=None")
  assert not slurm_queue.is_preempted(cancelled)
  assert not slurm_queue.is_preempted("")


def test_states_come_from_the_directory_and_the_queue(programs, workdir):
  """Element 0 runs though nothing has locked its directory; element 1 is gone."""
  (programs / "squeue.out").write_text(QUEUE)
  found = examine(workdir)
  assert (found["a"].state, found["a"].job) == (State.RUNNING, "1_0")
  assert (found["b"].state, found["b"].job) == (State.WAITING, "")
  assert f"--name={NAME}" in (programs / "calls").read_text()

  (programs / "squeue.out").write_text(QUEUE.replace("1_2", "1_1"))
  b = examine(workdir)["b"]
  assert (b.state, b.job, b.reason) == (State.QUEUED, "1_1", "Resources")
  assert view_lib.one_line(b) == "b: queued (1_1, Resources)"


def test_a_requeued_run_is_queued_whatever_its_last_attempt_was(programs, workdir):
  run = workdir / "runs" / "a"
  states.begin(run, 1 << 22, job="1_0")
  states.end(run, 143)
  (programs / "squeue.out").write_text(QUEUE.replace("RUNNING|None", "PENDING|BeginTime"))
  assert examine(workdir)["a"].state is State.QUEUED
  (programs / "squeue.out").write_text("")
  assert examine(workdir)["a"].state is State.INTERRUPTED
  assert states.read_record(run)["attempts"][0]["job"] == "1_0"


def test_a_finished_run_is_done_though_its_job_is_still_ending(programs, workdir):
  finish(workdir / "runs" / "a")
  (programs / "squeue.out").write_text(QUEUE.replace("RUNNING", "COMPLETING"))
  assert examine(workdir)["a"].state is State.DONE


def test_a_finished_sweep_is_read_without_slurm(programs, workdir):
  """On another machine, or years later."""
  for name in ("a", "b"):
    finish(workdir / "runs" / name)
  found = examine(workdir)
  assert {s.state for s in found.values()} == {State.DONE}
  assert not (programs / "calls").exists()


def test_only_the_newest_submission_of_a_run_counts(programs, workdir):
  submitted(workdir, job="2", name="moejax-20261128-101501-d4e5f6", when=2.0)
  (programs / "squeue.out").write_text(QUEUE)
  found = examine(workdir)
  assert (found["a"].state, found["a"].job) == (State.QUEUED, "2")


def test_a_job_that_ended_before_its_run_began_has_failed(programs, workdir):
  """Unless Slurm ended it; and only that run's job."""
  folder = slurm.submissions(workdir)[0].folder
  (folder / "1_0_0_log.err").write_text("bash: module: command not found\n")
  (folder / "1_1_0_log.err").write_text(
    "slurmstepd: error: *** JOB 5 ON vm CANCELLED AT 2026-11-28T09:03:51 ***\n"
  )
  found = examine(workdir)
  assert found["a"].state is State.FAILED
  assert found["a"].tail == ("bash: module: command not found",)
  assert found["b"].state is State.WAITING
  states.begin(workdir / "runs" / "a", 1 << 22, job="1_0")
  assert examine(workdir)["a"].state is State.INTERRUPTED


def test_a_slurm_that_does_not_answer_is_an_error_and_no_empty_queue(programs, workdir):
  """Runs that it has would be submitted again. --status shows what it can."""
  (programs / "squeue").write_text(
    "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact it' >&2; exit 1"
  )
  with pytest.raises(UserError, match="squeue fails: Unable to contact it"):
    examine(workdir)


def test_status_without_slurm_shows_the_directories(programs, workdir, capsys):
  (programs / "squeue").write_text("#!/bin/sh\nexit 1")
  assert schedule.status(workdir) == 1
  said = capsys.readouterr()
  assert "Judging by the directories alone: squeue fails" in said.err
  assert "2 runs: 2 waiting" in said.out


def test_a_damaged_submission_is_named_with_the_remedy(workdir):
  path = slurm.submissions(workdir)[0].folder / slurm.FILE
  path.write_text('{"name": "x"}')
  with pytest.raises(UserError) as error:
    slurm.submissions(workdir)
  assert str(path) in str(error.value) and f"scancel --name={NAME}" in str(error.value)


def test_variables_that_hide_jobs_are_not_passed_on(programs, monkeypatch):
  monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
  (programs / "squeue").write_text('#!/bin/sh\necho "1|$SQUEUE_STATES|RUNNING|None"')
  assert slurm_queue.jobs(["x"])[0].name == ""


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ({"partition": "mian"}, ("--slurm.partition=mian", "Did you mean main?")),
    ({"partition": "short", "time": "11"}, ("--slurm.time=11", "at most 10:00")),
    ({"partition": "long", "time": "8-0"}, ("--slurm.time=8-0", "at most 7-00:00:00")),
  ],
)
def test_what_the_cluster_does_not_have_is_refused_by_name(programs, given, words):
  with pytest.raises(UserError) as error:
    slurm_queue.check(SlurmOptions(**given))
  assert all(word in str(error.value) for word in words)


def test_what_the_cluster_has_is_not_refused(programs):
  slurm_queue.check(SlurmOptions(partition="short", time="10"))
  slurm_queue.check(SlurmOptions(partition="main,long", time="6-0"))
  slurm_queue.check(SlurmOptions())


@pytest.mark.parametrize(
  ("given", "named"),
  [
    ({"jobs": 2}, "--slurm.array_parallelism=2"),
    ({"devices_per_run": 2}, "--slurm.tasks_per_node"),
    ({"time_steps": 5}, "--executor=local"),
  ],
)
def test_options_of_local_runs_name_what_takes_their_place(
  programs, tmp_path, given, named
):
  options = schedule.Options(executor="slurm", **given)
  with pytest.raises(UserError) as error:
    schedule.run(tmp_path / "s", runs.points(), options=options)
  assert str(error.value).startswith(f"--{next(iter(given))}")
  assert named in str(error.value) and not (tmp_path / "s").exists()


def test_without_sbatch_nothing_is_made(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  options = schedule.Options(executor="slurm")
  with pytest.raises(UserError, match="there is no sbatch on the PATH"):
    schedule.run(tmp_path / "s", runs.points(), options=options)
  assert not (tmp_path / "s").exists()


SBATCH = """#!/bin/sh
env | grep -E "^(SLURM|SBATCH)_" >> {place}/environment
n=$(($(cat {place}/count 2> /dev/null) + 1))
echo $n > {place}/count
if [ $n -gt {most} ]; then
  echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2
  exit 1
fi
echo "Submitted batch job 7$n"
"""


@pytest.fixture
def made_jobs(programs, tmp_path, monkeypatch):
  """Three commands, for a cluster whose arrays have at most two elements."""
  (programs / "scontrol.out").write_text("MaxArraySize            = 2\nKillWait = 30\n")
  monkeypatch.delenv("SLURM_CONF", raising=False)
  names, place = ("a", "b", "c"), tmp_path / "sweep" / "runs"
  return [
    Job(name=n, run=place / n, command=("train", n), log=place / n / "log") for n in names
  ]


def test_runs_are_submitted_in_as_few_arrays_as_the_cluster_takes(
  programs, made_jobs, tmp_path
):
  """Each element finds its own command, by the number that Slurm gives it."""
  (programs / "sbatch").write_text(SBATCH.format(place=programs, most=9))
  found = slurm.submit(tmp_path / "sweep", made_jobs, SlurmOptions())
  assert [(s.job, s.runs) for s in found] == [("71", ("a", "b")), ("72", ("c",))]
  assert slurm.submissions(tmp_path / "sweep") == found
  assert [found[0].id_of(1), found[1].id_of(0)] == ["71_1", "72"]
  stored = found[0].folder / "71_1_submitted.pkl"
  task = pickle.loads(stored.read_bytes()).function
  assert task._job == made_jobs[1] and task._trains


def test_a_limit_that_is_met_midway_says_what_was_submitted(
  programs, made_jobs, tmp_path
):
  (programs / "sbatch").write_text(SBATCH.format(place=programs, most=1))
  with pytest.raises(UserError, match="Limit.*2 of 3 runs are submitted .71."):
    slurm.submit(tmp_path / "sweep", made_jobs, SlurmOptions())
  assert [s.job for s in slurm.submissions(tmp_path / "sweep")] == ["71"]


def test_a_sweep_inside_of_a_job_does_not_pass_its_place_on(
  programs, made_jobs, tmp_path, monkeypatch
):
  """A new job would take this one's number of tasks. What names the cluster stays."""
  kept = {"SLURM_CONF": "/etc/c", "SBATCH_ACCOUNT": "us"}
  for name, value in {**kept, "SLURM_NTASKS": "4", "SLURM_JOB_ID": "3"}.items():
    monkeypatch.setenv(name, value)
  (programs / "sbatch").write_text(SBATCH.format(place=programs, most=9))
  slurm.submit(tmp_path / "sweep", made_jobs[:1], SlurmOptions())
  passed = (programs / "environment").read_text().splitlines()
  assert sorted(passed) == sorted(f"{name}={value}" for name, value in kept.items())
  assert os.environ["SLURM_NTASKS"] == "4" and os.environ["SLURM_CONF"] == "/etc/c"


def test_slurms_own_words_are_told_once_and_a_refused_submission_leaves_nothing(
  programs, tmp_path, capfd
):
  said = "sbatch: error: Batch job submission failed: Invalid account specified"
  (programs / "sbatch").write_text(f"#!/bin/sh\necho '{said}' >&2; exit 1")
  workdir = tmp_path / "s"
  job = Job(name="a", run=workdir / "runs" / "a", command=("true",), log=workdir / "log")
  with pytest.raises(
    UserError, match="refuses the jobs: Batch job submission failed: In"
  ):
    slurm.submit(workdir, [job], SlurmOptions())
  assert slurm.submissions(workdir) == []
  assert capfd.readouterr().err == ""
