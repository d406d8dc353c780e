"""`--executor=slurm`: submits a sweep's runs, and shows them until they are over.

Nothing depends on this process: it may be stopped or killed at any time.
"""

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from moejax.errors import UserError
from moejax.sweep.execution import evaluations, slurm, slurm_queue, states
from moejax.sweep.execution import view as view_lib
from moejax.sweep.execution.local import Job
from moejax.sweep.execution.options import Options
from moejax.sweep.execution.slurm_options import checked
from moejax.sweep.execution.states import State, Status

EXAMINE_SECONDS = 2.0
"""Interval between checks of the runs' directories."""
QUEUE_SECONDS = 15.0
"""Interval between queries to Slurm, whose controller serves a whole cluster."""

_ACTIVE = (State.QUEUED, State.RUNNING)
_ABSENT = 2
"""Number of Slurm's answers without a job after which its result must be there: a network
file system may show a file some seconds late."""


def check(options: Options) -> None:
  """Refuses options of local runs, and options that this cluster would refuse.

  Raises:
    UserError: there are such options; nothing was written.
  """
  if options.jobs != 1:
    raise UserError(
      f"--jobs={options.jobs} is for --executor=local. With slurm, "
      f"--slurm.array_parallelism={options.jobs} limits the runs at once."
    )
  if options.devices_per_run is not None:
    raise UserError(
      f"--devices_per_run={options.devices_per_run} is for --executor=local. With slurm, "
      "give --slurm.gpus_per_node, and --slurm.tasks_per_node as many."
    )
  if options.time_steps:
    raise UserError(
      f"--time_steps={options.time_steps} with --executor=slurm would time this machine, "
      "not a node. Do it with --executor=local on a node (srun) when all runs are done."
    )
  checked(options.slurm)
  slurm_queue.check(options.slurm)


def refuse_submitted(found: Sequence[Status], executor: str) -> None:
  """Refuses to start runs here that have a Slurm job.

  Raises:
    UserError: a run has a job.
  """
  theirs = [s.job for s in found if s.job and s.state in _ACTIVE]
  if theirs:
    raise UserError(
      f"--executor={executor}: {len(theirs)} runs of this sweep have jobs in Slurm. Give "
      f"--executor=slurm to watch them, or cancel them: {slurm.cancel_command(theirs)}."
    )


# -------------------------------------------------------------------------- training


def train(
  workdir: Path,
  runs: Mapping[str, Path],
  wanted: Sequence[Job],
  found: Mapping[str, Status],
  options: Options,
  stream: Any,
) -> tuple[dict[str, Status], int | None]:
  """Submits runs, and shows all until none has a job.

  Ctrl-C and SIGTERM end this process; the jobs continue.

  Args:
    workdir: of the sweep.
    runs: directory of each run, by name.
    wanted: the runs to submit, unless they are running.
    found: all runs' statuses.
    options: of the sweep.
    stream: where progress is printed.

  Returns:
    The last statuses, and the signal that ended it, or None.

  Raises:
    UserError: Slurm refuses the jobs.
  """
  statuses, stop = dict(found), _Stop()
  wanted = [job for job in wanted if statuses[job.name].state not in _ACTIVE]
  made = slurm.submit(workdir, wanted, options.slurm) if wanted else []
  view = view_lib.make_view(stream)
  try:
    _tell(made, view)
    if made:
      statuses = slurm.examine(workdir, runs)
    view.update(statuses, _num_running(statuses))
    if options.slurm.wait:
      with stop:
        for newest in _watched(workdir, runs, statuses, view):
          statuses = newest
          view.update(statuses, _num_running(statuses))
  except KeyboardInterrupt:
    _tell_how_to_cancel(s.job for s in statuses.values())
    return statuses, stop.signal
  finally:
    view.close()
  return statuses, None


def _watched(
  workdir: Path,
  runs: Mapping[str, Path],
  statuses: dict[str, Status],
  view: view_lib.View,
) -> Iterator[dict[str, Status]]:
  """Yields the newest statuses repeatedly, until no run has a job."""
  asked, trouble = time.monotonic(), ""
  while any(s.state in _ACTIVE for s in statuses.values()):
    time.sleep(EXAMINE_SECONDS)
    if time.monotonic() < asked + QUEUE_SECONDS:
      statuses = {name: _fresher(status) for name, status in statuses.items()}
      yield statuses
      continue
    asked = time.monotonic()
    try:
      statuses, trouble = slurm.examine(workdir, runs), ""
    except slurm_queue.QueueError as error:
      # A controller may be restarted while jobs run.
      if str(error) != trouble:
        view.message(str(error))
      trouble = str(error)
    yield statuses


def _fresher(status: Status) -> Status:
  """Returns the status with the newest numbers from the run's directory.

  The queue decides whether it still has a job.
  """
  if status.state not in _ACTIVE:
    return status
  now = states.examine(status.path)
  if now.state is State.DONE:
    return now
  state = now.state if now.state is State.RUNNING else status.state
  reason = status.reason if state is State.QUEUED else ""
  return dataclasses.replace(
    now, state=state, job=status.job, reason=reason, exit_code=None, tail=()
  )


def _num_running(statuses: Mapping[str, Status]) -> int:
  return max(sum(s.state is State.RUNNING for s in statuses.values()), 1)


# ------------------------------------------------------------------------ evaluation


def evaluate(
  workdir: Path,
  jobs: Sequence[Job],
  results: Mapping[str, Path],
  options: Options,
  view: view_lib.View,
) -> int:
  """Submits evaluations, each with the resources of a run, and waits for their results.

  Args:
    workdir: of the sweep.
    jobs: the evaluations without a result.
    results: the file that each of them writes, by the job's name.
    options: of the sweep.
    view: where progress is printed.

  Returns:
    The exit code: 0, 1 if any failed, 128 + signal when stopped.

  Raises:
    UserError: Slurm refuses the jobs.
  """
  kind = f"evaluate {options.split} {options.eval_capacity_factor}"
  queued = slurm.queued(workdir, kind)
  fresh = [job for job in jobs if job.run.name not in queued]
  made = slurm.submit(workdir, fresh, options.slurm, kind) if fresh else []
  _tell(made, view)
  if not options.slurm.wait:
    return 0
  ids = [*(job.id for job in queued.values()), *(submission.job for submission in made)]
  stop = _Stop()
  try:
    with stop:
      return int(_await_results(workdir, jobs, results, kind, view))
  except KeyboardInterrupt:
    _tell_how_to_cancel(ids)
    return 128 + stop.signal


def _await_results(
  workdir: Path,
  jobs: Sequence[Job],
  results: Mapping[str, Path],
  kind: str,
  view: view_lib.View,
) -> bool:
  """Reports each evaluation when it is over; returns whether any has no result."""
  absent, any_failed = {job.name: 0 for job in jobs}, False
  waiting = list(jobs)
  while waiting:
    time.sleep(QUEUE_SECONDS)
    with contextlib.suppress(slurm_queue.QueueError):
      queued = slurm.queued(workdir, kind)
      for job in list(waiting):
        absent[job.name] = 0 if job.run.name in queued else absent[job.name] + 1
        over = results[job.name].exists()
        if over or absent[job.name] >= _ABSENT:
          waiting.remove(job)
          number = f"({len(jobs) - len(waiting)} of {len(jobs)})"
          view.message(f"{job.name}: {'evaluated' if over else 'failed'} {number}")
        if not over and absent[job.name] >= _ABSENT:
          any_failed = True
          print(evaluations.failure(job, None), file=sys.stderr)
  return any_failed


# ------------------------------------------------------------------- stops and messages


class _Stop:
  """While entered, SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

  def __init__(self) -> None:
    self.signal: int = signal.SIGINT
    self._before: Any = None

  def __enter__(self) -> None:
    if threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._raise)

  def __exit__(self, *_: object) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _raise(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.signal = number
    raise KeyboardInterrupt


def _tell(made: Sequence[slurm.Submission], view: view_lib.View) -> None:
  for submission in made:
    view.message(f"Submitted {len(submission.runs)} runs as job {submission.job}.")


def _tell_how_to_cancel(ids: Iterable[str]) -> None:
  command = slurm.cancel_command(ids)
  print(f"The jobs keep running. To cancel them: {command}", file=sys.stderr)
