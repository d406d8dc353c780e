"""How a sweep is run: its options other than the specification."""

import dataclasses
import shlex
from collections.abc import Callable

from moejax.sweep.execution.local import Job
from moejax.sweep.execution.slurm_options import SlurmOptions

EXECUTORS = ("local", "slurm", "print")


def command_of(job: Job) -> str:
  """Returns the command of a run, quoted for a shell."""
  return shlex.join(job.command)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How to run the points."""

  jobs: int = 1
  """Runs at once, each on its own cores or GPU."""
  executor: str = "local"
  """local starts the runs, slurm submits them; print only prints their commands."""
  text_of: Callable[[Job], str] = command_of
  """With print: returns the text to print for each run."""
  slurm: SlurmOptions = dataclasses.field(default_factory=SlurmOptions)
  """With slurm: the resources that each run requests."""
  retry_failed: bool = False
  """Start failed runs again, instead of only naming them."""
  devices_per_run: int | None = None
  """GPUs, or simulated CPU devices, of each run; see `local.make_slots`."""
  allow_changes: bool = False
  """Continue in the directory of a sweep with another specification."""
  compilation_cache: str | None = None
  """--compilation_cache of every run; None is the runs' default, which they share."""
  evaluate: bool = False
  """Evaluate the finished runs instead of training."""
  split: str = "validation"
  """For `evaluate`."""
  eval_capacity_factor: str | None = None
  """For `evaluate`: comma-separated capacity factors; None means each run's own."""
  time_steps: int = 0
  """Afterwards, time this many steps of each distinct shape alone; 0 means none."""
