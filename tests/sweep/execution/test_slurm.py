"""Jobs of a sweep, without a Slurm: options, the batch script, and what the queue means.

What squeue, sinfo and scontrol print here was recorded from Slurm 22.05.8, as
mini_slurm.sh starts it. test_slurm_real.py runs a real one.
"""

import contextlib
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest
from absl import flags

from moejax.cli import flags as cli
from moejax.errors import UserError
from moejax.sweep.execution import (
  schedule,
  slurm,
  slurm_options,
  slurm_queue,
  slurm_task,
  states,
)
from moejax.sweep.execution import view as view_lib
from moejax.sweep.execution.local import Job
from moejax.sweep.execution.slurm_options import SlurmOptions
from moejax.sweep.execution.states import State
from tests.sweep.execution import runs

NAME = "moejax-20261128-101500-a1b2c3"

QUEUE = f"""\
1_2|{NAME}|PENDING|Resources
1_3|{NAME}|PENDING|Nodes required for job are DOWN, DRAINED or reserved for jobs in \
higher priority partitions
2|moejax-20261128-101501-d4e5f6|PENDING|BeginTime
3|moejax-x|PENDING|JobHeldUser
1_0|{NAME}|RUNNING|None
"""

PREEMPTED = """\
JobId=4 ArrayJobId=1 ArrayTaskId=0 ArrayTaskThrottle=3 JobName=moejax-a1b2c3
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   PreemptEligibleTime=2026-11-28T09:11:03 PreemptTime=2026-11-28T09:11:04
   SuspendTime=None SecsPreSuspend=0 LastSchedEval=2026-11-28T09:11:03 Scheduler=Main
"""

SINFO = "main|infinite\nshort|10:00\nlong|7-00:00:00\n"


@pytest.fixture
def programs(tmp_path, monkeypatch):
  """Puts programs on the PATH that print what is written into a file of their name."""
  place = tmp_path / "bin"
  place.mkdir()
  for name in slurm_queue.PROGRAMS:
    (place / name).write_text(
      f"#!/bin/sh\necho $0 $* >> {place}/calls\ncat {place}/{name}.out"
    )
    (place / name).chmod(0o755)
    (place / f"{name}.out").write_text("")
  (place / "sinfo.out").write_text(SINFO)
  monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
  return place


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


# ---------------------------------------------------------------------------- options


@pytest.mark.parametrize(
  ("text", "minutes"),
  [
    ("90", 90),
    ("1:30", 2),
    ("1:30:00", 90),
    ("0:00:01", 1),
    ("2-0", 2880),
    ("1-12:30", 2190),
    ("1-00:00:01", 1441),
  ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text, minutes):
  """The formats of sbatch's manual; what is left of a minute counts as one."""
  assert slurm_options.minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "1h", "1:2:3:4", "1-", "-5", "unlimited"])
def test_other_time_limits_are_refused_by_name(text):
  with pytest.raises(UserError, match=f"--slurm.time={text}: expected"):
    slurm_options.minutes(text)


def test_runs_are_told_two_minutes_before_the_limit_or_a_third_of_it():
  assert SlurmOptions(time="60").warning_seconds == 120
  assert SlurmOptions(time="3").warning_seconds == 60
  assert SlurmOptions(time="60", signal_seconds=30).warning_seconds == 30


@pytest.mark.parametrize(
  ("given", "named"),
  [
    ({"nodes": 0}, "--slurm.nodes=0"),
    ({"tasks_per_node": -1}, "--slurm.tasks_per_node=-1"),
    ({"cpus_per_task": 0}, "--slurm.cpus_per_task=0"),
    ({"gpus_per_node": -1}, "--slurm.gpus_per_node=-1"),
    ({"array_parallelism": 0}, "--slurm.array_parallelism=0"),
    ({"mem": "4 GB"}, "--slurm.mem=4 GB"),
    ({"account": "my account"}, "--slurm.account='my account'"),
    ({"time": "1", "signal_seconds": 60}, "--slurm.signal_seconds=60"),
    ({"setup": ("a\nb",)}, "--slurm.setup"),
  ],
)
def test_values_that_no_slurm_takes_are_refused_by_name(given, named):
  with pytest.raises(UserError) as error:
    slurm_options.checked(SlurmOptions(**given))
  assert str(error.value).startswith(named)


@pytest.fixture
def defined_flags():
  """The flags, only while a test runs: other programs in this process have others."""
  before = set(flags.FLAGS)
  slurm_options.define_flags()
  yield
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)


def test_flags_give_the_options_and_a_misspelt_one_names_the_nearest(defined_flags):
  words = [
    "--slurm.time=2-0",
    "--slurm.gpus_per_node=8",
    "--slurm.setup=a",
    "--noslurm.wait",
  ]
  cli.parse(["sweep", *words, "--slurm.setup=b c"])
  found = slurm_options.from_flags()
  assert found == SlurmOptions(
    time="2-0", gpus_per_node=8, setup=("a", "b c"), wait=False
  )
  assert set(slurm_options.given()) == {
    "slurm.time",
    "slurm.gpus_per_node",
    "slurm.setup",
    "slurm.wait",
  }
  with pytest.raises(UserError, match="Did you mean --slurm.partition?"):
    cli.parse(["sweep", "--slurm.partion=a"])


# ------------------------------------------------------------------- the batch script


def script(tmp_path, **given) -> str:
  """The batch script of an array of two, as submitit writes it."""
  from submitit.slurm import slurm as submitit_slurm

  words = slurm.parameters(NAME, SlurmOptions(**given))
  return submitit_slurm._make_sbatch_string(
    command="THE_TASK", folder=tmp_path, map_count=2, **words
  )


def test_the_batch_script_asks_for_what_was_given(tmp_path):
  text = script(
    tmp_path,
    partition="gpu",
    time="2:00:00",
    nodes=2,
    tasks_per_node=4,
    gpus_per_node=4,
    cpus_per_task=8,
    mem="64G",
    array_parallelism=1,
    account="us",
    qos="low",
    constraint="a100",
    setup=("module load cuda",),
  )
  directives = {
    line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SB")
  }
  assert directives >= {
    "--partition=gpu",
    "--time=120",
    "--nodes=2",
    "--ntasks-per-node=4",
    "--gpus-per-node=4",
    "--cpus-per-task=8",
    "--mem=64G",
    "--array=0-1%1",
    "--account=us",
    "--qos=low",
    "--constraint=a100",
    "--signal=USR2@120",
    "--requeue",
    "--open-mode=append",
    f"--job-name={NAME}",
  }
  assert not any(line.startswith("--wckey") for line in directives)
  (srun,) = (line for line in text.splitlines() if line.startswith("srun "))
  assert srun.endswith("--kill-on-bad-exit=0 --cpus-per-task=8 --gpu-bind=none THE_TASK")
  assert text.index("module load cuda") < text.index("srun ")


def test_what_is_not_given_is_left_to_slurm(tmp_path):
  text = script(tmp_path)
  for word in ("partition", "account", "qos", "constraint", "mem", "gpu", "cpus"):
    assert f"--{word}" not in text


def test_each_job_makes_a_secret_of_its_own_that_no_file_holds(tmp_path):
  """The setup lines, run twice by a shell that has a secret's file from outside."""
  lines = slurm.parameters(NAME, SlurmOptions())["setup"]
  show = 'echo "$MOEJAX_JOB_SECRET/$MOEJAX_JOB_SECRET_FILE"'
  made = [
    subprocess.run(
      ["bash", "-ec", "\n".join([*lines, show])],
      env=os.environ | {"MOEJAX_JOB_SECRET_FILE": "x"},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for _ in range(2)
  ]
  assert made[0] != made[1]
  assert all(len(text.strip().removesuffix("/")) == 64 for text in made)


# -------------------------------------------------------------------------- the queue


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
  assert schedule.status(workdir) == 0
  said = capsys.readouterr()
  assert "By the directories alone: squeue fails" in said.err
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


# ------------------------------------------------------------------- inside of the job


CHILD = """
import pathlib, signal, sys, time

def stop(*_):
  step, code = sys.argv[2:]
  if step != "none":
    (pathlib.Path(sys.argv[1]) / "checkpoints" / step).mkdir(parents=True, exist_ok=True)
  sys.exit(int(code))

signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def make_task(tmp_path, monkeypatch):
  """Makes a task whose command saves a step and exits with a code at SIGTERM."""
  monkeypatch.setenv("SLURM_JOB_ID", "7")
  monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
  (tmp_path / "child.py").write_text(CHILD)

  def make(step="2", code=143):
    words = (sys.executable, str(tmp_path / "child.py"), str(tmp_path), step, str(code))
    log = tmp_path / "train.log"
    job = Job(name="a", run=tmp_path, command=words, log=log)
    return slurm_task.Task(job)

  return make


@contextlib.contextmanager
def requeues():
  """Counts calls of the handler that stands in for submitit's."""
  calls = []
  before = signal.signal(signal.SIGUSR2, lambda number, _: calls.append(number))
  try:
    yield calls
  finally:
    signal.signal(signal.SIGUSR2, before)


def tell_when_ready(log: pathlib.Path, *numbers: int) -> None:
  """Sends signals to this process as soon as the command is ready for one."""

  def tell():
    while "ready" not in (log.read_text() if log.exists() else ""):
      time.sleep(0.02)
    for number in numbers:
      os.kill(os.getpid(), number)

  threading.Thread(target=tell).start()


def run_task(task, tmp_path, *numbers):
  (tmp_path / "train.log").unlink(missing_ok=True)
  tell_when_ready(tmp_path / "train.log", *numbers)
  with pytest.raises(SystemExit) as left:
    task()
  return left.value.code


def test_a_job_is_requeued_after_its_run_has_saved(make_task, tmp_path):
  """The record says who ran; a real handler does not return here."""
  with requeues() as calls:
    assert run_task(make_task(), tmp_path, signal.SIGUSR2) == 143
  assert calls == [signal.SIGUSR2]
  (attempt,) = states.read_record(tmp_path)["attempts"]
  assert (attempt["job"], attempt["exit_code"]) == ("7", 143)


@pytest.mark.parametrize(("said", "expected"), [(PREEMPTED, 1), ("", 0)])
def test_sigterm_requeues_only_a_preempted_job(
  make_task, tmp_path, programs, said, expected
):
  """Because scancel sends it as well."""
  (programs / "scontrol.out").write_text(said)
  with requeues() as calls:
    assert run_task(make_task(), tmp_path, signal.SIGTERM) == 143
  assert len(calls) == expected


def test_a_run_that_failed_while_it_was_told_is_not_requeued(make_task, tmp_path):
  with requeues() as calls:
    assert run_task(make_task(code=1), tmp_path, signal.SIGUSR2) == 1
  assert calls == []


def test_a_run_that_never_comes_to_a_checkpoint_is_given_up(make_task, tmp_path):
  """The task is stored with the job, so it counts over its requeues."""
  task = make_task(step="none")
  with requeues() as calls:
    codes = [run_task(task, tmp_path, signal.SIGUSR2) for _ in range(3)]
  assert codes == [143, 143, 1] and len(calls) == 2
  found = states.examine(tmp_path)
  assert found.state is State.FAILED and "--slurm.time" in found.tail[-1]


def test_other_tasks_of_a_job_write_a_log_of_their_own_and_no_record(
  make_task, tmp_path, monkeypatch
):
  monkeypatch.setenv("SLURM_PROCID", "1")
  tell_when_ready(tmp_path / "train.1.log", signal.SIGUSR2)
  with requeues() as calls, pytest.raises(SystemExit):
    make_task()()
  assert calls == [] and states.read_record(tmp_path) == {}
  assert not (tmp_path / "train.log").exists()


def test_the_signal_to_requeue_does_not_reach_the_run(make_task, tmp_path):
  """Slurm sends it to every process of the job, and the default is to die of it."""
  task = make_task()
  log = tmp_path / "train.log"

  def tell():
    while "ready" not in (log.read_text() if log.exists() else ""):
      time.sleep(0.02)
    os.kill(states.read_record(tmp_path)["attempts"][0]["pid"], signal.SIGUSR2)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=tell).start()
  with requeues(), pytest.raises(SystemExit) as left:
    task()
  assert left.value.code == 143
