"""How a sweep is run: what its flags say beside the specification."""

import dataclasses
import shlex
from collections.abc import Callable

from moejax.sweep.execution.local import Job
from moejax.sweep.execution.slurm_options import SlurmOptions

EXECUTORS = ("local", "slurm", "print")


def command_of(job: Job) -> str:
  """Returns the command of a run as a shell takes it."""
  return shlex.join(job.command)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How to run the points."""

  jobs: int = 1
  """Runs at once, each on cores or a GPU of its own."""
  executor: str = "local"
  """local starts the runs, slurm submits them; print only prints their commands."""
  text_of: Callable[[Job], str] = command_of
  """With print: what is printed for each run."""
  slurm: SlurmOptions = dataclasses.field(default_factory=SlurmOptions)
  """With slurm: what each run asks of the cluster."""
  retry_failed: bool = False
  """Start failed runs again, instead of naming them."""
  devices_per_run: int | None = None
  """GPUs, or simulated CPU devices, of each run; see `local.make_slots`."""
  allow_changes: bool = False
  """Go on in the directory of a sweep with another specification."""
  compilation_cache: str | None = None
  """--compilation_cache of every run; None is the runs' own default, which they share."""
  evaluate: bool = False
  """Evaluate the finished runs instead of training."""
  split: str = "validation"
  """For `evaluate`."""
  eval_capacity_factor: str | None = None
  """For `evaluate`: capacity factors, separated by commas; None is each run's own."""
  time_steps: int = 0
  """Afterwards, time this many steps of each distinct shape alone; 0 is off."""
