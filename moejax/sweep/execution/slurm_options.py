"""The resources that a sweep's jobs request from Slurm, as flags and as an object.

The flags are `--slurm.NAME`. Values are checked here as far as possible without Slurm;
`slurm_queue.check` checks them against the cluster. Nothing here imports jax or submitit.
"""

import dataclasses
import re
from typing import Any

from absl import flags

from moejax.errors import UserError

flags.disclaim_key_flags()

MAX_SIGNAL_SECONDS = 120
"""Default warning before the time limit, unless a third of the limit is less."""

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
_MEMORY = re.compile(r"\d+[KMGT]?")
_INTEGERS = ("nodes", "tasks_per_node", "cpus_per_task", "array_parallelism")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmOptions:
  """Resources of each job, one job per run."""

  partition: str = ""
  time: str = "1:00:00"
  """Time limit in a format of sbatch: minutes, H:MM:SS or D-HH:MM:SS."""
  nodes: int = 1
  tasks_per_node: int = 1
  gpus_per_node: int | None = None
  cpus_per_task: int | None = None
  mem: str = ""
  """Memory per node, such as 4G."""
  array_parallelism: int = 256
  """Most jobs of an array that run at once."""
  account: str = ""
  qos: str = ""
  constraint: str = ""
  setup: tuple[str, ...] = ()
  """Shell lines to run before the run, on the first node of the job."""
  signal_seconds: int | None = None
  """Seconds between the request to save and the time limit; see `warning_seconds`."""
  wait: bool = True
  """Wait and show the runs' states, instead of exiting after the submission."""

  @property
  def minutes(self) -> int:
    """The time limit, rounded up."""
    return minutes(self.time)

  @property
  def warning_seconds(self) -> int:
    """Seconds before the time limit at which a run is asked to save."""
    if self.signal_seconds is not None:
      return self.signal_seconds
    return min(MAX_SIGNAL_SECONDS, self.minutes * 60 // 3)


def minutes(text: str) -> int:
  """Returns a time limit in minutes, rounded up.

  Args:
    text: in a format of sbatch: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

  Raises:
    UserError: another format, or no time at all.
  """
  match = _TIME.fullmatch(text.strip())
  parts = [int(part) for part in match["rest"].split(":")] if match else [0]
  days = int(match["days"] or 0) if match else 0
  # Without days, the first of one or two numbers means minutes.
  is_hours = len(parts) == 3 or (match is not None and match["days"] is not None)
  hours, mins, seconds = ([*parts, 0, 0] if is_hours else [0, *parts, 0])[:3]
  total = -(-(86_400 * days + 3600 * hours + 60 * mins + seconds) // 60)
  if not match or not total:
    raise UserError(
      f"--slurm.time={text}: expected a time limit, such as 90 (minutes), 1:30:00 or "
      "2-12:00:00."
    )
  return total


def define_flags() -> None:
  """Defines --slurm.NAME for each option."""
  text, number = flags.DEFINE_string, flags.DEFINE_integer
  text("slurm.partition", "", "With --executor=slurm: partition; default: Slurm's own.")
  text("slurm.time", "1:00:00", "Time limit of a job; runs continue in a new one.")
  number("slurm.nodes", 1, "Nodes per run.")
  number("slurm.tasks_per_node", 1, "Processes of each run per node; one per GPU.")
  number("slurm.gpus_per_node", None, "GPUs of each run per node.")
  number("slurm.cpus_per_task", None, "Cores per process.")
  text("slurm.mem", "", "Memory of each run per node, such as 4G.")
  number("slurm.array_parallelism", 256, "Maximum number of runs at once.")
  text("slurm.account", "", "Account to charge.")
  text("slurm.qos", "", "Quality of service.")
  text("slurm.constraint", "", "Features that the nodes must have.")
  flags.DEFINE_multi_string(
    "slurm.setup", [], "Shell line to run before each run; may be given several times."
  )
  number(
    "slurm.signal_seconds",
    None,
    f"Seconds before the time limit at which runs save; default: {MAX_SIGNAL_SECONDS}, "
    "at most a third of the limit.",
  )
  flags.DEFINE_bool(
    "slurm.wait", True, "Show the runs until they end; otherwise exit after submitting."
  )


def from_flags() -> SlurmOptions:
  """Returns the checked options of this command line.

  Raises:
    UserError: a value that no Slurm accepts.
  """
  names = [field.name for field in dataclasses.fields(SlurmOptions)]
  values: dict[str, Any] = {n: flags.FLAGS[f"slurm.{n}"].value for n in names}
  values["setup"] = tuple(values["setup"])
  return checked(SlurmOptions(**values))


def given() -> list[str]:
  """Returns the names of the --slurm.NAME flags on this command line."""
  return [
    name
    for name in flags.FLAGS
    if name.startswith("slurm.") and flags.FLAGS[name].present
  ]


def checked(options: SlurmOptions) -> SlurmOptions:
  """Returns the options if Slurm could accept them.

  Raises:
    UserError: it could not; the message names the flag.
  """
  limit = minutes(options.time)
  for name in _INTEGERS:
    value = getattr(options, name)
    if value is not None and value < 1:
      raise UserError(f"--slurm.{name}={value}: at least 1.")
  if options.gpus_per_node is not None and options.gpus_per_node < 0:
    raise UserError(f"--slurm.gpus_per_node={options.gpus_per_node}: at least 0.")
  if options.mem and not _MEMORY.fullmatch(options.mem):
    raise UserError(
      f"--slurm.mem={options.mem}: expected a number with K, M, G or T, such as 4G."
    )
  if not 0 < options.warning_seconds < 60 * limit:
    raise UserError(
      f"--slurm.signal_seconds={options.warning_seconds}: must be above 0 and below "
      f"--slurm.time={options.time}."
    )
  for name in ("partition", "account", "qos", "constraint"):
    if re.search(r"\s", getattr(options, name)):
      raise UserError(
        f"--slurm.{name}={getattr(options, name)!r}: no spaces are allowed."
      )
  if any("\n" in line for line in options.setup):
    raise UserError("--slurm.setup: give each line in a flag of its own.")
  return options
