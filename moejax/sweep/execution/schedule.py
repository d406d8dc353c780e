"""Runs the points of a sweep: starts, resumes, watches and evaluates them.

What remains to be done is read from the runs' directories (states.py), never
remembered, so the same call continues after any interruption.
"""

import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.cost import flops, parameters
from moejax.errors import UserError
from moejax.evaluate.perplexity import parse_capacity_factors
from moejax.routing import registry
from moejax.sweep.execution import (
  children,
  directory,
  evaluations,
  identity,
  local,
  shapes,
  slurm,
  slurm_run,
  states,
  timing,
)
from moejax.sweep.execution import view as view_lib
from moejax.sweep.execution.options import EXECUTORS, Options
from moejax.sweep.execution.states import State, Status
from moejax.sweep.spec import RUNS, Point

_EXAMINE_SECONDS = 1.0
"""Interval between checks of the directories of running runs."""


def run(
  workdir: Path,
  points: Sequence[Point],
  *,
  options: Options,
  spec: Mapping[str, Any] | None = None,
  differences: directory.Differences | None = None,
  stream: Any = None,
) -> int:
  """Trains, or with `options.evaluate` evaluates, the points of a sweep.

  Args:
    workdir: of the sweep; created if missing.
    points: in the order in which they start.
    options: how to run them.
    spec: stored as spec.json; None stores the points' names and digests.
    differences: compares two forms of `spec`; see `directory.opened`.
    stream: where progress is printed; None is standard output.

  Returns:
    0 if every run is done (or evaluated), 1 if any is not, 128 + signal when stopped.

  Raises:
    UserError: an error that the user can fix; nothing was started.
  """
  workdir, stream = Path(workdir), sys.stdout if stream is None else stream
  _check(points, options)
  is_slurm = options.executor == "slurm"
  slots = [] if is_slurm else local.make_slots(options.jobs, options.devices_per_run)
  stored = plain_spec(points) if spec is None else spec
  with directory.opened(
    workdir,
    stored,
    differences=differences,
    allow_changes=options.allow_changes,
  ):
    runs = {p.name: workdir / RUNS / p.directory for p in points}
    timing.read(workdir)
    found = [states.examine(path) for path in runs.values()]
    _refuse_damaged(found)
    for status in found:
      if status.note:
        print(f"Note: {status.note}", file=sys.stderr)
    for point in points:
      _prepare(runs[point.name], point)
    if options.evaluate:
      code = _evaluate(workdir, runs, points, options, slots, stream)
    else:
      code = _train(workdir, runs, points, options, slots, stream)
    if options.time_steps and options.executor == "local" and code <= 1:
      slot, steps = slots[0], options.time_steps
      code = max(code, timing.measure(workdir, points, steps, slot, stream))
    return code


def status(workdir: Path, *, num_jobs: int = 1, stream: Any = None) -> int:
  """Prints the table of a sweep's runs; takes no lock, and starts nothing.

  Returns:
    0 if every point of the sweep is done, 1 if any is not or spec.json is damaged.

  Raises:
    UserError: the directory holds no sweep.
  """
  if not (Path(workdir) / RUNS).is_dir():
    raise UserError(
      f"--workdir={workdir} holds no sweep (it has no {RUNS}/). Give the directory that "
      "the sweep was given as --workdir."
    )
  wanted, trouble = [], ""
  try:
    wanted = directory.point_directories(directory.read_spec(Path(workdir)))
  except UserError as error:
    trouble = str(error)
  there = [path.name for path in directory.run_directories(Path(workdir))]
  names = dict.fromkeys([*wanted, *there])
  runs = {name: Path(workdir) / RUNS / name for name in names}
  try:
    found = slurm.examine(Path(workdir), runs)
  except UserError as error:
    print(f"Judging by the directories alone: {error}", file=sys.stderr)
    found = {name: states.examine(path) for name, path in runs.items()}
  view_lib.print_table(list(found.values()), num_jobs, stream)
  if trouble:
    print(trouble, file=sys.stderr)
  # Directories of earlier points, no longer part of the sweep, do not keep it open.
  is_open = any(found[name].state is not State.DONE for name in wanted or there)
  return int(is_open or bool(trouble))


def plain_spec(points: Sequence[Point]) -> dict[str, Any]:
  """Returns a specification that only lists the points."""
  return {"points": {point.name: point.digest for point in points}}


def _check(points: Sequence[Point], options: Options) -> None:
  if options.executor not in EXECUTORS:
    raise UserError(f"--executor={options.executor}: choose from {', '.join(EXECUTORS)}.")
  if options.jobs < 1:
    raise UserError(f"--jobs={options.jobs}: at least 1.")
  if options.devices_per_run is not None and options.devices_per_run < 1:
    raise UserError(f"--devices_per_run={options.devices_per_run}: at least 1.")
  if options.time_steps < 0:
    raise UserError(f"--time_steps={options.time_steps}: at least 0.")
  if options.evaluate and options.eval_capacity_factor is not None:
    parse_capacity_factors(options.eval_capacity_factor)
  if options.executor == "slurm":
    slurm_run.check(options)
  names = [point.name for point in points]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise UserError(f"Two runs of this sweep have the name {twice[0]}.")


def _refuse_damaged(found: Sequence[Status]) -> None:
  # A running run may be writing; another config's must not get this point's workload.
  damages = [
    s.damage
    for s in found
    if s.damage and (s.state is not State.RUNNING or identity.trouble(s.path))
  ]
  if damages:
    more = f" And {len(damages) - 1} more." if len(damages) > 1 else ""
    raise UserError(damages[0] + more)


def _prepare(path: Path, point: Point) -> None:
  """Makes a run's directory with its config and workload, unless it exists already."""
  directory.write_config(path, point.name, point.config)
  if states.read_record(path).get("plan", {}).get("digest") == point.digest:
    return
  config = point.config
  vocab_size = parameters.resolve_vocab_size(config)
  workload = states.Workload(
    name=point.name,
    digest=point.digest,
    num_steps=config.train.num_steps,
    tokens_per_step=flops.tokens_per_step(config),
    flops_per_token=flops.flops_per_token(config, vocab_size)["total"],
  )
  states.write_workload(path, workload)


def train_job(path: Path, point: Point, options: Options) -> local.Job:
  """Returns the command that starts or resumes a point's run."""
  flags = [f"--config={path / directory.CONFIG_MODULE}", f"--workdir={path}"]
  if options.compilation_cache is not None:
    flags.append(f"--compilation_cache={options.compilation_cache}")
  return local.Job(
    name=point.name,
    run=path,
    command=local.command("train", *flags),
    log=path / states.LOG_FILE,
    program=shapes.program_digest(point.config),
  )


# -------------------------------------------------------------------------- training


def _train(
  workdir: Path,
  runs: Mapping[str, Path],
  points: Sequence[Point],
  options: Options,
  slots: Sequence[local.Slot],
  stream: Any,
) -> int:
  jobs = [train_job(runs[point.name], point, options) for point in points]
  found = slurm.examine(workdir, runs)
  wanted = [job for job in jobs if _is_wanted(found[job.name], options.retry_failed)]
  if options.executor == "slurm":
    found, signal = slurm_run.train(workdir, runs, wanted, found, options, stream)
    if signal is not None:
      return 128 + signal
    if not options.slurm.wait:
      return int(any(s.state is State.FAILED for s in found.values()))
    return _conclude(found, None, options)
  slurm_run.refuse_submitted(list(found.values()), options.executor)
  if options.executor == "print":
    routers = os.environ.get(registry.ENV)
    words = ["env", f"{registry.ENV}={routers}"] if routers else []
    for job in wanted:
      job = dataclasses.replace(job, command=(*words, *job.command))
      print(options.text_of(job), file=stream)
    return 0
  view = view_lib.make_view(stream)
  try:
    queue = _Training(wanted, found, view, len(slots))
    signal = children.work_off(queue, local.Pool(slots))
  finally:
    view.close()
  return _conclude(queue.statuses, signal, options)


def _is_wanted(found: Status, retry_failed: bool) -> bool:
  if found.state in (State.QUEUED, State.DAMAGED):
    return False
  if found.state is State.FAILED:
    return retry_failed
  return found.state is not State.DONE


def _conclude(found: Mapping[str, Status], signal: int | None, options: Options) -> int:
  """Names the runs that are not done, and returns the exit code."""
  for text in view_lib.failures(list(found.values())):
    print(text, file=sys.stderr)
  for s in found.values():
    if s.state is State.DAMAGED:
      print(s.damage, file=sys.stderr)
  failed = sum(s.state is State.FAILED for s in found.values())
  if failed and not options.retry_failed:
    print(f"--retry_failed runs the failed ones ({failed}) again.", file=sys.stderr)
  if signal is not None:
    print("Stopped. The same command continues the sweep.", file=sys.stderr)
    return 128 + signal
  for s in found.values():
    if s.state is State.INTERRUPTED:
      print(
        f"{s.name} was interrupted (exit code {s.exit_code}) at step {s.step}. The same "
        "command continues it.",
        file=sys.stderr,
      )
  return int(any(s.state is not State.DONE for s in found.values()))


class _Training:
  """The runs to start, each at most once, and the state of all of them."""

  def __init__(
    self,
    jobs: Sequence[local.Job],
    found: Mapping[str, Status],
    view: view_lib.View,
    num_slots: int,
  ):
    self.statuses = dict(found)
    self._waiting = list(jobs)
    self._active: dict[str, local.Job] = {}
    self._first_step: dict[str, int] = {}
    self._view, self._num_slots = view, num_slots
    self._examined = time.monotonic()
    view.update(self.statuses, num_slots)
    for job in self._elsewhere():
      view.message(f"{job.name} is run by another process: waiting until it ends.")

  def next(self, running: list[local.Job]) -> tuple[local.Job, int] | None:
    startable = [job for job in self._waiting if job not in self._elsewhere()]
    if not startable:
      return None
    # Later runs load what an earlier one compiled, so equal programs start one after
    # another as long as there is other work. Waiting for them would gain nothing.
    compiling = {
      job.program
      for job in running
      if self.statuses[job.name].step == self._first_step[job.name]
    }
    fresh = [job for job in startable if job.program not in compiling]
    job = (fresh or startable)[0]
    self._waiting.remove(job)
    return job, states.num_attempts(job.run) + 1

  def is_empty(self) -> bool:
    return not self._waiting

  def started(self, job: local.Job, pid: int) -> None:
    self._record(states.begin, job, pid)
    self._active[job.name] = job
    self._first_step[job.name] = self.statuses[job.name].step
    self._examine([job])

  def not_started(self, job: local.Job, error: OSError) -> None:
    self._view.message(f"{job.name} cannot be started: {error}")

  def ended(self, job: local.Job, exit_code: int) -> None:
    self._record(states.end, job, exit_code)
    del self._active[job.name]
    self._examine([job])

  def tick(self) -> None:
    if time.monotonic() < self._examined + _EXAMINE_SECONDS:
      return
    self._examined = time.monotonic()
    self._examine([*self._active.values(), *self._elsewhere()])
    # Some were finished by another process meanwhile.
    self._waiting = [
      job for job in self._waiting if self.statuses[job.name].state is not State.DONE
    ]

  def _record(
    self, write: Callable[[Path, int], None], job: local.Job, value: int
  ) -> None:
    """Writes a run's record; a problem with it must not end the other runs."""
    try:
      write(job.run, value)
    except (OSError, UserError) as error:
      self._view.message(f"The record of {job.name} cannot be written: {error}")

  def _elsewhere(self) -> list[local.Job]:
    """Returns the runs of the queue that another process runs now."""
    return [
      job for job in self._waiting if self.statuses[job.name].state is State.RUNNING
    ]

  def _examine(self, jobs: Sequence[local.Job]) -> None:
    for job in jobs:
      self.statuses[job.name] = states.examine(job.run)
    self._view.update(self.statuses, self._num_slots)


# ------------------------------------------------------------------------ evaluation


def _evaluate(
  workdir: Path,
  runs: Mapping[str, Path],
  points: Sequence[Point],
  options: Options,
  slots: Sequence[local.Slot],
  stream: Any,
) -> int:
  """Evaluates the finished runs that have no result for these settings yet."""
  jobs, results, unfinished, kept = [], {}, [], 0
  for point in points:
    path = runs[point.name]
    found = states.examine(path)
    if found.state is not State.DONE:
      unfinished.append(found)
      continue
    request = (options.split, options.eval_capacity_factor)
    results[point.name] = evaluations.result_file(path, point.config, *request)
    if results[point.name].exists():
      kept += 1
      continue
    jobs.append(evaluations.job(path, point, *request, cache=options.compilation_cache))
  if options.executor == "print":
    for job in jobs:
      print(shlex.join(job.command), file=stream)
    return 0
  view = view_lib.Lines(stream)
  for s in unfinished:
    view.message(f"{view_lib.one_line(s)}: left out, since it is not finished.")
  if kept:
    view.message(f"{kept} of {len(points)} runs have this evaluation already.")
  if options.executor == "slurm":
    return slurm_run.evaluate(workdir, jobs, results, options, view)
  queue = evaluations.Evaluating(jobs, view)
  signal = children.work_off(queue, local.Pool(slots))
  for job, code in queue.failed:
    print(evaluations.failure(job, code), file=sys.stderr)
  return 128 + signal if signal is not None else int(bool(queue.failed))
