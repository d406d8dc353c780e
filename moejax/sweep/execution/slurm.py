"""Runs of a sweep as jobs of a Slurm cluster, submitted with submitit.

    WORKDIR/slurm/SUBMISSION/submission.json   the submitted runs, in order
    WORKDIR/slurm/SUBMISSION/*_submission.sh   the batch script
    WORKDIR/slurm/SUBMISSION/*_log.{out,err}   what jobs printed besides the runs' logs

A submission is one array of jobs, or one job. Its name, which is also that of its jobs,
is in submission.json before Slurm gets it. So the queue shows which runs have a job, even
if any process dies at any time. Jobs depend on no process here: see slurm_task.py.
"""

import contextlib
import dataclasses
import io
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax import files
from moejax.errors import UserError
from moejax.launch import secret
from moejax.sweep.execution import slurm_queue, slurm_task, states
from moejax.sweep.execution.local import Job
from moejax.sweep.execution.slurm_options import SlurmOptions
from moejax.sweep.execution.states import State, Status

FOLDER = "slurm"
FILE = "submission.json"

PREFIX = "moejax-"
"""Prefix of the names of jobs."""

TRAIN = "train"
"""The kind of a submission that trains; others name an evaluation."""

_ENDLESS = 1_000_000
"""submitit's limit of requeues, in effect none; `slurm_task.MAX_IDLE` is the real one."""
_STOPPED_BY = ("CANCELLED", "PREEMPT", "NODE FAIL", "TIME LIMIT", "User defined signal 2")
"""Texts in the output of a job that was ended from outside before its run started."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submission:
  """Jobs that were submitted together."""

  name: str
  folder: Path
  kind: str
  """TRAIN, or the name of an evaluation; for one run, equal kinds are the same work."""
  runs: tuple[str, ...]
  """Names of the runs' directories, in the order of the array."""
  job: str
  """Id of the array or job; "" if not known, because its submission was interrupted."""
  time: float
  """Seconds since the epoch."""

  def id_of(self, index: int) -> str:
    """Returns the id of one of its jobs, in the form for scancel."""
    return f"{self.job}_{index}" if len(self.runs) > 1 else self.job


# ------------------------------------------------------------------------ submission


def submit(
  workdir: Path, jobs: Sequence[Job], options: SlurmOptions, kind: str = TRAIN
) -> list[Submission]:
  """Submits commands, each as a separate job, in as few arrays as Slurm allows.

  Args:
    workdir: of the sweep.
    jobs: the commands.
    options: resources of each.
    kind: TRAIN, or what is evaluated.

  Raises:
    UserError: Slurm refuses, in its words.
  """
  size = slurm_queue.max_array_size() if len(jobs) > 1 else 1
  made: list[Submission] = []
  for start in range(0, len(jobs), size):
    try:
      made.append(_submit_array(workdir, jobs[start : start + size], options, kind))
    except UserError as error:
      if not made:
        raise
      ids = ", ".join(s.job for s in made)
      raise UserError(
        f"{error} {start} of {len(jobs)} runs are submitted ({ids}); the same command "
        "submits the rest later."
      ) from error
  return made


def _submit_array(
  workdir: Path, jobs: Sequence[Job], options: SlurmOptions, kind: str
) -> Submission:
  import submitit
  from submitit.core.utils import FailedJobError

  number = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
  folder = (workdir / FOLDER / number).absolute()
  folder.mkdir(parents=True)
  made = Submission(
    name=PREFIX + number,
    folder=folder,
    kind=kind,
    runs=tuple(job.run.name for job in jobs),
    job="",
    time=time.time(),
  )
  _write(made)
  tasks = [slurm_task.Task(_absolute(job), trains=kind == TRAIN) for job in jobs]
  try:
    executor = submitit.SlurmExecutor(folder, max_num_timeout=_ENDLESS)
    executor.update_parameters(**parameters(made.name, options))
    # submitit prints sbatch's error, which is reported below.
    with _outside_of_any_job(), contextlib.redirect_stderr(io.StringIO()):
      with executor.batch():
        submitted = [executor.submit(task) for task in tasks]
  except (FailedJobError, OSError) as error:
    shutil.rmtree(folder)
    words = slurm_queue.in_words(str(error))
    raise UserError(
      f"--executor=slurm: Slurm refuses the jobs: {words}. Change --slurm.*."
    ) from error
  made = dataclasses.replace(made, job=submitted[0].job_id.partition("_")[0])
  _write(made)
  return made


@contextlib.contextmanager
def _outside_of_any_job() -> Iterator[None]:
  """Hides a surrounding job's variables, which would be taken for those of a new one.

  Keeps the variables that locate the cluster, and the user's own defaults.
  """
  import submitit
  from submitit.core.utils import environment_variables

  kept = {
    name: value
    for name, value in os.environ.items()
    if name == "SLURM_CONF" or name.startswith("SBATCH_")
  }
  with submitit.helpers.clean_env():
    with environment_variables(**kept):
      yield


def parameters(name: str, options: SlurmOptions) -> dict[str, Any]:
  """Returns the parameters of submitit's executor.

  Args:
    name: of the jobs.
    options: resources of each.
  """
  # srun must not kill the other tasks, which may still be saving, when the first one has
  # ended.
  srun = ["--kill-on-bad-exit=0"]
  if options.cpus_per_task is not None:
    # Since Slurm 22.05, srun no longer takes it from the batch script.
    srun.append(f"--cpus-per-task={options.cpus_per_task}")
  if options.gpus_per_node:
    # jax uses the GPU with its index on the node, so each task must see all of them.
    srun.append("--gpu-bind=none")
  given: dict[str, Any] = {
    "partition": options.partition,
    "account": options.account,
    "qos": options.qos,
    "constraint": options.constraint,
    "cpus_per_task": options.cpus_per_task,
    "gpus_per_node": options.gpus_per_node,
  }
  more: dict[str, Any] = {"requeue": True}
  if options.mem:
    more["mem"] = options.mem
  # The meeting's secret is made in each job, passed to the tasks in their environment,
  # and never written.
  make = "$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n')"
  setup = [f"{secret.ENV}={make}", f"export {secret.ENV}", f"unset {secret.FILE_ENV}"]
  return {
    "job_name": name,
    "wckey": None,  # submitit sets one, which a cluster may refuse.
    "time": options.minutes,
    "nodes": options.nodes,
    "ntasks_per_node": options.tasks_per_node,
    "signal_delay_s": options.warning_seconds,
    "array_parallelism": options.array_parallelism,
    "setup": [*setup, *options.setup],
    "srun_args": srun,
    "additional_parameters": more,
    **{key: value for key, value in given.items() if value not in ("", None)},
  }


def _absolute(job: Job) -> Job:
  return dataclasses.replace(job, run=job.run.absolute(), log=job.log.absolute())


def _write(submission: Submission) -> None:
  values = dataclasses.asdict(submission)
  del values["folder"]
  files.write_json(submission.folder / FILE, values)


def submissions(workdir: Path) -> list[Submission]:
  """Returns the submissions from a sweep's directory, oldest first.

  Raises:
    DamagedError: a submission.json cannot be read.
  """
  found = []
  for path in sorted((workdir / FOLDER).glob(f"*/{FILE}")):
    try:
      values = files.read_json(path)
      values = values | {"runs": tuple(map(str, values["runs"]))}
      found.append(Submission(folder=path.parent, **values))
    except (OSError, ValueError, TypeError, KeyError) as error:
      raise states.DamagedError(
        f"{path} cannot be read ({type(error).__name__}: {error}). Cancel its jobs "
        f"(scancel --name={PREFIX}{path.parent.name}), then delete {path.parent}."
      ) from error
  return sorted(found, key=lambda s: (s.time, s.name))


# ---------------------------------------------------------------------------- states


def examine(workdir: Path, runs: Mapping[str, Path]) -> dict[str, Status]:
  """Returns the status of every run, from its directory and Slurm's queue.

  Args:
    workdir: of the sweep.
    runs: directory of each run, by name.

  Raises:
    QueueError: Slurm has been used here and does not answer.
    DamagedError: see `submissions`.
  """
  newest = _newest(workdir, TRAIN)
  found = {name: states.examine(path) for name, path in runs.items()}
  # A finished run stays finished: a finished sweep is read without Slurm.
  open_runs = {
    name: path
    for name, path in runs.items()
    if path.name in newest and found[name].state is not State.DONE
  }
  jobs = _queued({path.name: newest[path.name] for path in open_runs.values()}, workdir)
  for name, path in open_runs.items():
    # Read after the queue: a job that is no longer queued has left its traces here.
    status = states.examine(path)
    found[name] = combined(status, *newest[path.name], jobs.get(path.name))
  return found


def combined(
  status: Status, submission: Submission, index: int, job: slurm_queue.Job | None
) -> Status:
  """Returns a run's status, given its newest submission and its job in Slurm.

  Args:
    status: status from the run's directory alone.
    submission: the newest with this run.
    index: index of the run in it.
    job: None if Slurm no longer has it.
  """
  if status.state is State.DONE:
    return status
  if job is not None:
    waits = job.is_waiting and status.state is not State.RUNNING
    state = State.QUEUED if waits else State.RUNNING
    reason = job.reason if waits and job.reason != "None" else ""
    return dataclasses.replace(
      status, state=state, job=job.id, reason=reason, exit_code=None, tail=()
    )
  if status.state not in (State.WAITING, State.INTERRUPTED) or not submission.job:
    return status
  tail = _never_started(status, submission, index)
  if not tail:
    return status
  return dataclasses.replace(status, state=State.FAILED, job=submission.job, tail=tail)


def _never_started(status: Status, submission: Submission, index: int) -> tuple[str, ...]:
  """Returns the output of a job that ended by itself before its run began, else ().

  The cause may be a failing line of --slurm.setup, or a node without moejax.
  """
  own = submission.id_of(index)
  try:
    attempts = states.read_record(status.path).get("attempts", [])
  except states.DamagedError:
    return ()
  if any(attempt.get("job") == own for attempt in attempts):
    return ()
  lines: list[str] = []
  for file in slurm_task.log_files(submission.folder):
    if file.name.startswith(f"{own}_"):
      lines += states.log_tail(file)
  said = "\n".join(lines)
  if any(word in said for word in _STOPPED_BY):
    return ()
  return tuple(lines[-states.TAIL_LINES :])


def queued(workdir: Path, kind: str) -> dict[str, slurm_queue.Job]:
  """Returns Slurm's jobs for submissions of a kind, by the run's directory.

  Args:
    workdir: of the sweep.
    kind: TRAIN, or what is evaluated.

  Raises:
    QueueError: Slurm has been used here and does not answer.
    DamagedError: see `submissions`.
  """
  return _queued(_newest(workdir, kind), workdir)


def _queued(
  newest: Mapping[str, tuple[Submission, int]], workdir: Path
) -> dict[str, slurm_queue.Job]:
  try:
    jobs = slurm_queue.jobs({s.name for s, _ in newest.values()})
  except slurm_queue.QueueError as error:
    raise slurm_queue.QueueError(
      f"{error} If you are sure that Slurm has no more jobs of this sweep, delete "
      f"{workdir / FOLDER}."
    ) from error
  found = {(job.name, job.index): job for job in jobs}
  places = {run: (s.name, index) for run, (s, index) in newest.items()}
  return {run: found[place] for run, place in places.items() if place in found}


def _newest(workdir: Path, kind: str) -> dict[str, tuple[Submission, int]]:
  """Returns the newest submission of each run and its index there, by directory name."""
  return {
    run: (submission, index)
    for submission in submissions(workdir)
    if submission.kind == kind
    for index, run in enumerate(submission.runs)
  }


def cancel_command(jobs: Iterable[str]) -> str:
  """Returns the command that cancels jobs, whole arrays at once; skips ""."""
  ids = sorted({job.partition("_")[0] for job in jobs if job}, key=_as_number)
  return shlex.join(["scancel", *ids])


def _as_number(job: str) -> tuple[int, str]:
  return (int(job) if job.isdecimal() else 0, job)
