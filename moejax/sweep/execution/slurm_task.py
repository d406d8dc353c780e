"""A task of a Slurm job: runs a command, and has the job requeued in time.

    USR2       from `#SBATCH --signal` before the time limit, or from a preemption: the
               command saves and stops (SIGTERM), and Slurm queues the job again
    SIGTERM    from scancel, or from a preemption with a grace period: the command saves
               and stops; the job is requeued only if Slurm reports a preemption

If a job has several tasks, each of them starts the command, and the processes find each
other by variables that srun sets (moejax/launch/distributed.py). The task of rank 0 keeps
the run's record and requeues the job.

It is pickled by submitit and loaded on the node, so nothing here imports jax.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from moejax.run.files import DIRECTORY, list_steps
from moejax.sweep.execution import slurm_queue, states
from moejax.sweep.execution.local import Job

MAX_IDLE = 3
"""A run stopped this many times without a new checkpoint is not requeued again."""

_POLL_SECONDS = 0.1
_FAILED = 1
_TOLD = (signal.SIGTERM, signal.SIGUSR2)


class Task:
  """A command that `submitit` calls in each task of the job."""

  def __init__(self, job: Job, *, trains: bool = True):
    """Args:
    job: the command.
    trains: whether it resumes, and its attempts are recorded. An evaluation starts over.
    """
    self._job, self._trains = job, trains
    self._idle = 0

  def __call__(self) -> None:
    """Runs the command, and exits with its exit code unless that is 0.

    Raises:
      SystemExit: with the exit code.
    """
    # submitit has installed it; called below, outside of any signal handler.
    requeue: Any = signal.getsignal(signal.SIGUSR2)
    is_first = os.environ.get("SLURM_PROCID", "0") == "0"
    records = is_first and self._trains
    begun_at = self._newest_step()
    with _noted() as told:
      process = self._start(is_first)
      if records:
        states.begin(self._job.run, process.pid, job=job_id())
      code = _wait(process, told)
      if records:
        states.end(self._job.run, code)
      if code == 0:
        return
      if is_first and code in states.INTERRUPTIONS and _is_to_go_on(told):
        self._idle = 0 if self._newest_step() > begun_at else self._idle + 1
        if self._idle < MAX_IDLE:
          _requeue(requeue)
        else:
          self._give_up()
          code = _FAILED
    sys.exit(code if code > 0 else 128 - code)

  def checkpoint(self) -> Any:
    """Returns what the requeued job runs: the same command, which resumes."""
    import submitit

    return submitit.helpers.DelayedSubmission(self)

  def _start(self, is_first: bool) -> subprocess.Popen[bytes]:
    rank = os.environ.get("SLURM_PROCID", "0")
    log = self._job.log
    if not is_first:
      log = log.with_name(f"{log.stem}.{rank}{log.suffix}")
    number = states.num_attempts(self._job.run) + 1 if self._trains else 1
    with open(log, "ab") as output, _blocked(signal.SIGUSR2):
      output.write(states.log_header(number, shlex.join(self._job.command)).encode())
      output.flush()
      return subprocess.Popen(
        self._job.command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        # Otherwise Python buffers output to a file, and the log is read live.
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
      )

  def _newest_step(self) -> int:
    return max(list_steps(self._job.run / DIRECTORY), default=-1)

  def _give_up(self) -> None:
    text = (
      f"error: stopped {MAX_IDLE} times in a row before anything was saved. Raise "
      "--slurm.time.\n"
    )
    with open(self._job.log, "a", encoding="utf-8") as output:
      output.write(text)
    if self._trains:
      states.end(self._job.run, _FAILED)


def job_id() -> str:
  """Returns the id of the job around this process, in the form for scancel."""
  array = os.environ.get("SLURM_ARRAY_JOB_ID")
  if array:
    return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
  return os.environ.get("SLURM_JOB_ID", "")


@contextlib.contextmanager
def _noted() -> Iterator[set[int]]:
  """Collects requests to stop (signals) while the body runs."""
  told: set[int] = set()

  def note(number: int, frame: FrameType | None) -> None:
    del frame
    told.add(number)

  before = {number: signal.signal(number, note) for number in _TOLD}
  try:
    yield told
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
  """Blocks a signal, also in the processes that the body starts.

  Slurm sends it to every process of the job, and a child would die of it.
  """
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(process: subprocess.Popen[bytes], told: set[int]) -> int:
  """Waits for the command; asks it once to save and stop if this task is told to stop."""
  is_asked = False
  while (code := process.poll()) is None:
    if told and not is_asked:
      with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
      is_asked = True
    time.sleep(_POLL_SECONDS)
  return code


def _is_to_go_on(told: set[int]) -> bool:
  if signal.SIGUSR2 in told:
    return True
  # scancel also sends SIGTERM, and then the user wants the job to end.
  return bool(told) and slurm_queue.is_preempted(slurm_queue.describe(job_id()))


def _requeue(handler: Callable[[int, None], None]) -> None:
  """Has submitit store this task and requeue the job, which ends this process."""
  try:
    handler(signal.SIGUSR2, None)
  except (OSError, subprocess.SubprocessError) as error:
    # Slurm requeues a preempted job itself, if so configured. Otherwise the next call of
    # the sweep submits the run again.
    print(f"The job was not requeued: {error}", file=sys.stderr, flush=True)


def log_files(folder: Path) -> list[Path]:
  """Returns what the tasks of a submission printed besides their commands' logs."""
  return sorted(folder.glob("*_log.*"))
