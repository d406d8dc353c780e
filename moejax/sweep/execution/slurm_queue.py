"""Queries to Slurm: which jobs it has, and whether it would accept one.

Uses squeue, sinfo and scontrol, but never sacct: many clusters have no accounting, and
the outcome of a run is in its directory (moejax/sweep/execution/states.py).
"""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Collection, Sequence

from moejax.errors import UserError, did_you_mean
from moejax.sweep.execution.slurm_options import SlurmOptions, minutes

PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "sinfo")

_SECONDS = 60.0
"""Time limit of a query: a busy controller may take long to answer."""
_FORMAT = "%i|%j|%T|%r"
_WAITING = frozenset(
  {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
)
_MAX_ARRAY = 1001


class QueueError(UserError):
  """Slurm does not answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A job, or an element of an array, that Slurm has and that has not ended."""

  id: str
  """Id in the form for scancel: 12, or 12_3 in an array."""
  name: str
  index: int
  """Index in its array; 0 for a job without one."""
  state: str
  """Slurm's word, such as PENDING."""
  reason: str
  """Why it waits, in Slurm's words, such as Resources; None if it does not wait."""

  @property
  def is_waiting(self) -> bool:
    return self.state in _WAITING


def jobs(names: Collection[str]) -> list[Job]:
  """Returns the jobs with these names that have not ended, of any user.

  Raises:
    QueueError: squeue fails.
  """
  if not names:
    return []
  text = _ask("squeue", "-h", "-r", f"--name={','.join(sorted(names))}", "-o", _FORMAT)
  return parse(text)


def parse(text: str) -> list[Job]:
  """Returns the jobs in the output of `squeue -h -r -o '%i|%j|%T|%r'`."""
  found = []
  for line in text.splitlines():
    words = line.strip().split("|", 3)
    if len(words) != 4:
      continue
    job, name, state, reason = words
    _, _, index = job.partition("_")
    found.append(
      Job(
        id=job,
        name=name,
        index=int(index) if index.isdecimal() else 0,
        state=state,
        reason=reason,
      )
    )
  return found


def check(options: SlurmOptions) -> None:
  """Refuses options that this Slurm would refuse, or leave in its queue for ever.

  Raises:
    UserError: no Slurm, no submitit, an unknown partition or a time above its limit.
  """
  missing = [name for name in PROGRAMS if shutil.which(name) is None]
  if missing:
    raise UserError(
      f"--executor=slurm: there is no {missing[0]} on the PATH. Start the sweep where "
      "Slurm is installed, or use --executor=local, or print for the commands alone."
    )
  if importlib.util.find_spec("submitit") is None:
    raise UserError(
      "--executor=slurm needs the package submitit: pip install 'moejax[slurm]'."
    )
  limits = partitions(_ask("sinfo", "-h", "-o", "%R|%l"))
  partition = options.partition
  for name in partition.split(",") if partition else ():
    if name not in limits:
      raise UserError(
        f"--slurm.partition={partition}: sinfo lists no partition {name}. "
        f"{did_you_mean(name, limits)}"
      )
    limit = limits[name]
    if limit is not None and options.minutes > minutes(limit):
      raise UserError(
        f"--slurm.time={options.time}: the partition {name} allows at most {limit} "
        "(sinfo). Give less: a run that reaches the limit is requeued and continues."
      )


def partitions(text: str) -> dict[str, str | None]:
  """Returns each partition's time limit, None if it has none.

  Args:
    text: what `sinfo -h -o '%R|%l'` prints.
  """
  rows = [line.strip().split("|") for line in text.splitlines() if "|" in line]
  return {name: None if limit in ("infinite", "n/a") else limit for name, limit in rows}


def max_array_size() -> int:
  """Returns the most elements that an array of jobs may have."""
  for line in _ask("scontrol", "show", "config").splitlines():
    name, _, value = line.partition("=")
    if name.strip() == "MaxArraySize" and value.strip().isdecimal():
      return max(int(value), 1)
  return _MAX_ARRAY


def is_preempted(text: str) -> bool:
  """Returns whether a job was preempted.

  Args:
    text: what `scontrol show job ID` prints.
  """
  words = dict(word.split("=", 1) for word in text.split() if "=" in word)
  return words.get("PreemptTime", "None") not in ("None", "Unknown", "N/A")


def describe(job: str) -> str:
  """Returns the output of `scontrol show job`; empty if it fails."""
  try:
    return _ask("scontrol", "show", "job", job)
  except QueueError:
    return ""


def in_words(stderr: str) -> str:
  """Returns the messages of a Slurm program in one line, each once."""
  said = [line.partition("error: ")[2] or line for line in stderr.splitlines()]
  return " ".join(dict.fromkeys(" ".join(line.split()) for line in said if line.strip()))


def _ask(program: str, *words: str) -> str:
  # Variables such as SQUEUE_STATES would hide jobs.
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SQUEUE_", "SINFO_"))
  }
  command: Sequence[str] = (program, *words)
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, timeout=_SECONDS, env=environment
    )
  except (OSError, subprocess.SubprocessError) as error:
    raise QueueError(
      f"{program} fails: {error}. Is Slurm reachable from here?"
    ) from error
  if done.returncode:
    raise QueueError(
      f"{program} fails: {in_words(done.stderr)}. Is Slurm reachable from here?"
    )
  return done.stdout
