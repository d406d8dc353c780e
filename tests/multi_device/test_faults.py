"""Processes that differ, die, leave or hang: who says what, and how soon."""

import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from moejax.cli import launch_local
from moejax.launch import hang
from tests.experiments.test_command_lines import QUICK

ROOT = pathlib.Path(__file__).parents[2]


# -------------------------------------------------------------------------- liveness

WATCHED = """
import os, pathlib, signal, sys, time
from moejax.errors import UserError
from moejax.launch import hang, liveness, meeting
liveness.GRACE_SECONDS, liveness._LAST_SECONDS = 1.0, {last}
index, count = (int(os.environ[n]) for n in ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"))
links = meeting.meet(os.environ["JAX_COORDINATOR_ADDRESS"], count, index, {}, 60)
with liveness.Watch(index, links):
  pathlib.Path(f"ready_{index}").touch()
"""


class Job:
  """Real processes with a log each, in one directory."""

  def __init__(self, directory: pathlib.Path, command: list[str], count: int, devices=1):
    self.directory, self.processes = directory, []
    port = launch_local.free_port()
    for index in range(count):
      env = launch_local.environment(index, count, devices, port)
      env["PYTHONPATH"] = str(ROOT)
      with open(self.log_file(index), "wb") as log:
        self.processes.append(
          subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=directory
          )
        )

  def __enter__(self) -> "Job":
    return self

  def __exit__(self, *_) -> None:
    for process in self.processes:
      process.kill()
      process.wait()

  def log_file(self, index: int) -> pathlib.Path:
    return self.directory / f"log_{index}"

  def log(self, index: int) -> str:
    return self.log_file(index).read_text(errors="replace")

  def wait_for(self, condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
      logs = [self.log(i)[-2000:] for i in range(len(self.processes))]
      assert time.monotonic() < deadline, "\n".join(logs)
      time.sleep(0.02)

  def ready(self) -> bool:
    return len(list(self.directory.glob("ready_*"))) == len(self.processes)

  def codes(self, seconds: float = 60.0) -> list[int]:
    return [process.wait(timeout=seconds) for process in self.processes]


def watched(
  directory: pathlib.Path, body: str, count: int = 3, last: float = 20.0
) -> Job:
  script = WATCHED.replace("{last}", str(last))
  script += textwrap.indent(textwrap.dedent(body), "  ")
  return Job(directory, [sys.executable, "-c", script], count)


@pytest.mark.parametrize("victim", [0, 2])
def test_the_death_of_a_process_ends_the_others_and_has_a_name(tmp_path, victim):
  """SIGKILL of the coordinator or another: code 3 and who it was, within seconds."""
  with watched(tmp_path, "time.sleep(300)") as job:
    job.wait_for(job.ready)
    job.processes[victim].kill()
    began = time.monotonic()
    codes = job.codes()
    assert time.monotonic() - began < 10
  assert codes == [-signal.SIGKILL if i == victim else 3 for i in range(3)]
  for index in {0, 1, 2} - {victim}:
    assert f"error: process {victim} ({socket.gethostname()}) was lost" in job.log(index)


@pytest.mark.parametrize(
  ("error", "others"), [("ValueError", 1), ("jax.errors.JaxRuntimeError", 3)]
)
def test_an_error_of_one_process_ends_the_others(tmp_path, error, others):
  """A traceback and code 1 of its own; the others name it.

  They have the code of a bug too, so that no launcher starts the job again; but an error
  of the runtime may be of a network, and then they have lost a process.
  """
  body = f"""
    if index == 1:
      import jax
      raise {error}("a bug")
    time.sleep(300)
  """
  with watched(tmp_path, body) as job:
    assert job.codes() == [others, 1, others]
  assert "Traceback" in job.log(1)
  name = error.rpartition(".")[2]
  for index in (0, 2):
    assert "process 1" in job.log(index) and f"{name}: a bug" in job.log(index)


def test_a_mistake_that_one_process_sees_is_everyone_s(tmp_path):
  """Such as a --workdir in use, which only process 0 looks for: code 2, the same text."""
  body = """
    if index == 0:
      raise UserError("--workdir=x is in use")
    time.sleep(300)
  """
  with watched(tmp_path, body) as job:
    assert job.codes() == [2, 2, 2]
  for index in range(3):
    assert job.log(index).splitlines()[-1] == "error: --workdir=x is in use"


def test_a_mistake_that_all_see_is_told_by_each_itself(tmp_path):
  """Whoever is first must not take the words from the others."""
  body = """
    time.sleep(0.3 * index)
    raise UserError(f"seen by {index}")
  """
  with watched(tmp_path, body) as job:
    assert job.codes() == [2, 2, 2]
  for index in range(3):
    assert job.log(index).splitlines()[-1] == f"error: seen by {index}"


def test_nobody_leaves_before_all_are_done(tmp_path):
  """A process that is done early waits, and still hears of a death."""
  body = """
    if index == 2:
      time.sleep(300)
  """
  with watched(tmp_path, body) as job:
    job.wait_for(job.ready)
    time.sleep(1)
    assert all(p.poll() is None for p in job.processes)
    job.processes[2].kill()
    assert job.codes() == [3, 3, -signal.SIGKILL]


def test_all_done_is_a_success(tmp_path):
  """Nobody takes the end of another for a death, in whatever order they come to it."""
  with watched(tmp_path, "time.sleep(0.2 * index)") as job:
    assert job.codes() == [0, 0, 0]
  assert not any("error" in job.log(i) for i in range(3))


def test_a_forked_worker_does_not_hide_the_death_of_its_parent(tmp_path):
  """The worker outlives its parent and would keep the parent's connections open."""
  body = """
    if os.fork() == 0:
      time.sleep(20)
      os._exit(0)
    time.sleep(300)
  """
  with watched(tmp_path, body) as job:
    job.wait_for(job.ready)
    time.sleep(0.5)
    job.processes[1].kill()
    began = time.monotonic()
    assert job.codes() == [3, -signal.SIGKILL, 3]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("message", ['{"failed": true}', "[" * 9000])
def test_a_peer_that_talks_nonsense_is_lost_and_does_not_stop_the_watch(
  tmp_path, message
):
  """Code 3 and its name; the thread that watches does not die of it in silence."""
  body = f"""
    if index == 1:
      links[0].socket.sendall(b'{message}' + bytes([10]))
    time.sleep(300)
  """
  with watched(tmp_path, body, last=1.0) as job:
    assert job.codes() == [3, 3, 3]
  assert "process 1" in job.log(0) and "was lost" in job.log(0)


# ------------------------------------------------------------------------------ hang


def test_a_hang_shows_the_stacks_of_each_process_and_goes_on(tmp_path):
  """A stopped process is not dead: it reports too once it can, then both finish."""
  body = """
    with hang.reported(1.5, f"process {index}"):
      def wait_in_vain():
        pathlib.Path(f"waits{index}").touch()
        while not pathlib.Path("go").exists():
          time.sleep(0.1)
      wait_in_vain()
      hang.progress()
  """
  with watched(tmp_path, body, count=2) as job:
    # Not `ready`: a process stopped before it waits would be reported elsewhere.
    job.wait_for(lambda: all((tmp_path / f"waits{i}").exists() for i in range(2)))
    job.processes[1].send_signal(signal.SIGSTOP)
    job.wait_for(lambda: "in wait_in_vain" in job.log(0))
    assert "has not finished a step" not in job.log(1)
    job.processes[1].send_signal(signal.SIGCONT)
    job.wait_for(lambda: "in wait_in_vain" in job.log(1))
    assert [p.poll() for p in job.processes] == [None, None]
    (tmp_path / "go").touch()
    assert job.codes() == [0, 0]
  for index in range(2):
    assert f"process {index} has not finished a step for" in job.log(index)
    assert "--hang_timeout=1.5" in job.log(index) and "goes on" in job.log(index)


def test_stacks_can_be_asked_for(tmp_path):
  """SIGUSR1 writes them at once, without ending the process."""
  body = """
    with hang.reported(600.0):
      pathlib.Path("entered").touch()
      while not pathlib.Path("go").exists():
        time.sleep(0.1)
  """
  with watched(tmp_path, body, count=2) as job:
    job.wait_for((tmp_path / "entered").exists)
    time.sleep(0.2)
    job.processes[0].send_signal(signal.SIGUSR1)
    job.wait_for(lambda: "Current thread" in job.log(0))
    (tmp_path / "go").touch()
    assert job.codes() == [0, 0]


def test_progress_keeps_a_run_from_being_reported(capfd):
  """Steps of half the time are no hang; unwatched, progress() is nothing."""
  hang.progress()
  with hang.reported(0.6):
    for _ in range(5):
      time.sleep(0.3)
      hang.progress()
  assert "hang" not in capfd.readouterr().err


# --------------------------------------------------------------------- whole programs


def train(directory: pathlib.Path, *extra: str, per_process=None) -> Job:
  """Two processes of experiments.train, experts over both."""
  settings = [
    f"--config.{s}" for s in (*QUICK, "mesh.expert=2", "train.tensorboard=false")
  ]
  settings += [f"--config.data.cache_dir={directory / 'cache'}"]
  settings += [f"--workdir={directory / 'run'}"]
  code = (
    "import os, runpy, sys\n"
    f"sys.argv += {per_process or {}}.get(os.environ['JAX_PROCESS_ID'], [])\n"
    "runpy.run_module('experiments.train', run_name='__main__', alter_sys=True)"
  )
  command = [sys.executable, "-c", code, *settings, *extra]
  return Job(directory, command, 2)


@pytest.mark.parametrize(
  ("different", "words"),
  [
    ("--config.train.seed=7", "--config.train.seed is 0 on process 0 and 7 on process 1"),
    ("--num_processes=3", "--num_processes is 2 on process 0 and 3 on process 1"),
  ],
)
def test_processes_started_differently_are_refused(tmp_path, different, words):
  """Code 4 and the same line on both, before a compile or a file in the directory."""
  place = []
  if different.startswith("--num"):
    port = launch_local.free_port()
    place = [f"--coordinator_address=127.0.0.1:{port}"]
    ours = {"0": ["--num_processes=2", "--process_id=0"]}
    ours["1"] = [different, "--process_id=1"]
  else:
    ours = {"1": [different]}
  with train(tmp_path, *place, per_process=ours) as job:
    assert job.codes() == [4, 4]
  errors = [[x for x in job.log(i).splitlines() if x[:6] == "error:"] for i in range(2)]
  assert errors[0] == errors[1] and len(errors[0]) == 1 and words in errors[0][0]
  assert not (tmp_path / "run").exists()


def test_places_by_the_launcher_meet_too(tmp_path):
  """Slurm's variables alone: jax says who is who, and a lost peer is still told."""
  port = launch_local.free_port()
  script = """
    import os, time
    index = os.environ.pop("JAX_PROCESS_ID")
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"):
      del os.environ[name]
    os.environ |= {
      "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
      "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": index, "SLURM_LOCALID": index,
      "SLURM_STEP_NUM_NODES": "1", "JAX_COORDINATOR_PORT": "PORT",
    }
    from moejax.launch import distributed
    with distributed.joined(facts={}, timeout=60):
      open("ready_" + index, "w").close()
      time.sleep(300)
  """
  script = textwrap.dedent(script).replace("PORT", str(port))
  with Job(tmp_path, [sys.executable, "-c", script], 2) as job:
    job.wait_for(job.ready)
    job.processes[0].kill()
    assert job.codes() == [-signal.SIGKILL, 3]
  assert "error: process 0" in job.log(1)


def steps(job: Job) -> int:
  metrics = job.directory / "run" / "metrics.jsonl"
  return len(metrics.read_text().splitlines()) if metrics.exists() else 0


STEPS = 24
LONG = (
  f"--config.train.num_steps={STEPS}",
  "--config.train.log_every=1",
  "--config.train.eval_every=0",
  "--config.train.checkpoint_every=4",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> pathlib.Path:
  """The directory of a run of two processes that nobody killed."""
  directory = tmp_path_factory.mktemp("undisturbed")
  with train(directory, *LONG) as job:
    assert job.codes(600) == [0, 0]
  return directory / "run"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_job_started_again_ends_as_an_undisturbed_one(
  tmp_path, undisturbed, victim
):
  """Killed some steps after a checkpoint: the same bits in state, every loss the same."""
  from tools.kill_loop import compare

  with train(tmp_path, *LONG) as job:
    job.wait_for(lambda: steps(job) >= 10, 300)
    job.processes[victim].kill()
    began = time.monotonic()
    codes = job.codes()
    assert time.monotonic() - began < 60
    assert codes[1 - victim] == 3
    assert f"error: process {victim} " in job.log(1 - victim)
    assert steps(job) < STEPS
  with train(tmp_path, *LONG) as job:
    assert job.codes(600) == [0, 0]
    assert "Resuming" in job.log(0)
  assert compare(undisturbed, tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.skipif(
  not hasattr(resource, "prlimit"), reason="Linux limits other processes"
)
def test_a_save_that_fails_in_one_process_ends_the_job(tmp_path, undisturbed):
  """Not a hang: the others would wait in the midst of the save. Nothing saved is lost."""
  from tools.kill_loop import compare

  with train(tmp_path, *LONG) as job:
    job.wait_for((tmp_path / "run" / "checkpoints" / "4").exists, 300)
    limit = (10_000, resource.RLIM_INFINITY)
    resource.prlimit(job.processes[1].pid, resource.RLIMIT_FSIZE, limit)
    assert job.codes(120) == [2, 2]
    for index in (0, 1):
      assert "could not be saved" in job.log(index)
      assert "by process 1" in job.log(index)
  with train(tmp_path, *LONG) as job:
    assert job.codes(600) == [0, 0]
    assert "Resuming" in job.log(0)
  assert compare(undisturbed, tmp_path / "run") == []


@pytest.mark.slow
def test_a_stopped_process_of_a_run_is_reported_and_the_run_finishes(tmp_path):
  """Its peer hangs in a collective and says where; both report, neither leaves."""
  with train(tmp_path, *LONG, "--hang_timeout=8") as job:
    job.wait_for(lambda: steps(job) >= 3, 300)
    # On a busy machine the first compile is reported too: only what comes now counts.
    before = [len(job.log(i)) for i in range(2)]
    job.processes[1].send_signal(signal.SIGSTOP)
    reported = [f"hang: process {i} has not finished a step" for i in range(2)]
    job.wait_for(lambda: reported[0] in job.log(0)[before[0] :], 120)
    job.wait_for(lambda: "moejax/train/loop.py" in job.log(0)[before[0] :])
    assert reported[1] not in job.log(1)[before[1] :]
    job.processes[1].send_signal(signal.SIGCONT)
    assert job.codes(600) == [0, 0]
    assert reported[1] in job.log(1)[before[1] :]
  assert os.path.exists(tmp_path / "run" / "eval.json")
