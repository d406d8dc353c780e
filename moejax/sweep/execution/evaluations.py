"""Evaluates the finished runs of a sweep, each with `moejax evaluate`."""

from collections.abc import Sequence
from pathlib import Path

from moejax.config import Config
from moejax.config.pattern import layer_pattern
from moejax.evaluate.perplexity import own_factors, parse_capacity_factors, spelled
from moejax.run import results
from moejax.sweep.execution import local, shapes, states
from moejax.sweep.execution.view import View
from moejax.sweep.spec import Point

LOG_FILE = "evaluate.log"


def result_file(path: Path, config: Config, split: str, factors: str | None) -> Path:
  """Returns the file that `moejax evaluate` writes for a finished run.

  Args:
    path: the run's directory.
    config: of the run.
    split: --split.
    factors: --eval_capacity_factor; None is the run's own.
  """
  own = own_factors(config.moe, _has_experts(config))
  wanted = own if factors is None else parse_capacity_factors(factors)
  evaluation = {
    "step": config.train.num_steps,
    "split": split,
    # Equal numbers, since the whole split is evaluated.
    "tokens": 1,
    "split_tokens": 1,
    "results": [{"eval_capacity_factor": spelled(factor)} for factor in wanted],
  }
  names = [spelled(factor) for factor in own]
  return path / f"{results.name('eval', evaluation, [], names)}.json"


def _has_experts(config: Config) -> bool:
  return not config.moe.dense_twin and any(
    layer_pattern(config.model.num_layers, config.moe).is_moe
  )


def job(
  path: Path, point: Point, split: str, factors: str | None, cache: str | None = None
) -> local.Job:
  """Returns the command that evaluates a finished run.

  Args:
    path: the run's directory.
    point: of the run.
    split: --split.
    factors: --eval_capacity_factor; None is the run's own.
    cache: --compilation_cache; None is the program's default.
  """
  flags = [f"--workdir={path}", f"--split={split}"]
  if factors is not None:
    flags.append(f"--eval_capacity_factor={factors}")
  if cache is not None:
    flags.append(f"--compilation_cache={cache}")
  return local.Job(
    name=point.name,
    run=path,
    command=local.command("evaluate", *flags),
    log=path / LOG_FILE,
    program=shapes.program_digest(point.config),
  )


def failure(job: local.Job, code: int | None) -> str:
  """Returns the name, exit code, log and last lines of a failed evaluation.

  Args:
    job: the evaluation.
    code: None if it is not known.
  """
  how = "" if code is None else f" (exit code {code})"
  head = f"Evaluating {job.name} failed{how}. The end of {job.log}:"
  return "\n".join([head, *(f"  {line}" for line in states.log_tail(job.log))])


class Evaluating:
  """The evaluations to start, and those that failed."""

  def __init__(self, jobs: Sequence[local.Job], view: View):
    self.failed: list[tuple[local.Job, int]] = []
    self._waiting, self._view = list(jobs), view
    self._total, self._over = len(jobs), 0

  def next(self, running: list[local.Job]) -> tuple[local.Job, int] | None:
    del running
    return (self._waiting.pop(0), 1) if self._waiting else None

  def is_empty(self) -> bool:
    return not self._waiting

  def started(self, job: local.Job, pid: int) -> None:
    del job, pid

  def not_started(self, job: local.Job, error: OSError) -> None:
    self._view.message(f"{job.name} cannot be started: {error}")
    self.ended(job, 1)

  def ended(self, job: local.Job, exit_code: int) -> None:
    self._over += 1
    if exit_code:
      self.failed.append((job, exit_code))
    how = f"failed (exit code {exit_code})" if exit_code else "evaluated"
    self._view.message(f"{job.name}: {how} ({self._over} of {self._total})")

  def tick(self) -> None:
    pass
