"""A campaign of kills and faults: whatever happens to a run, it ends with the same bits.

  python -m tools.campaign [--faults=30] [--minutes=M] [--seed=0] [--workdir=DIR]
    [--where=disk,bucket,processes] [--nosmall] [--config.SECTION.FIELD=VALUE ...]

Trains once undisturbed, by one process and, if asked for, by two. Then runs of the same
config are disturbed, in turn on a disk, in an emulated bucket and by two processes, and
are started again with the same command whenever they end: kills, stops, shifted clocks,
damaged checkpoints, removed directories, and refused, late, lost or cut requests. Each
run that completes must have the state and the logged losses of the undisturbed one, bit
for bit, must have exited with the documented codes on the way, and must not have printed
a traceback.

Prints one line per fault, and at the end a table: how often each kind was inflicted, and
how long the run took to its next complete checkpoint. Exit code 1 if a run differs.

The small model and text are those of `tools.kill_loop`, which only kills. --workdir keeps
all runs and logs for a closer look.
"""

import contextlib
import dataclasses
import pathlib
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator

from absl import flags

from moejax.cli import flags as cli
from moejax.errors import UserError
from moejax.storage.paths import run_path
from tools import kill_loop
from tools.campaign_faults import FAULTS, SAVE, START, Fault
from tools.campaign_jobs import Bucket, Cloud, Job, Processes

_PER_RUN = 8
"""Faults after which a run may go to its end; then the next place has its turn."""

_QUIET = (
  "train.sample=false",
  "train.report=false",
  "train.trace_steps=0",
  "train.final_eval_tokens=128",
)
"""Parts of a run's end that take seconds and decide nothing here."""

_TWO = "--config.mesh.expert=2"


@dataclasses.dataclass
class Tally:
  """Of one kind of fault in one place."""

  count: int = 0
  seconds: list[float] = dataclasses.field(default_factory=list)
  """From the next start, or the end of the fault, to the next complete checkpoint."""
  said: str = ""
  """Last line by which a run answered."""


class Campaign:
  """Inflicts faults, and counts them."""

  def __init__(self, rng: random.Random, faults: int, minutes: float):
    """Args:
    rng: of kinds and moments.
    faults: to be inflicted in all.
    minutes: after which no further one is.
    """
    self._rng = rng
    self._faults = faults
    self._deadline = time.monotonic() + 60 * minutes
    self.done = 0
    self.tallies: dict[tuple[str, str], Tally] = {}
    """By place and the fault's name."""
    self._decks: dict[str, list[Fault]] = {}
    self._start_up: dict[str, float] = {}

  def over(self) -> bool:
    return self.done >= self._faults or time.monotonic() > self._deadline

  def disturb(self, job: Job, faults: int = _PER_RUN) -> None:
    """Trains a run to its end, with up to so many faults on the way.

    Raises:
      UserError: an exit code that no fault explains, or a run that hangs.
    """
    allowed: frozenset[int] = frozenset()
    last: Fault | None = None
    end = self.done + faults
    job.start()
    while True:
      fault = self._draw(job) if self.done < end and not self.over() else None
      arrived = self._arrive(job, fault, last)
      if arrived and fault is not None:
        # A run that the fault before ends, may still have to end.
        allowed = fault.codes | (allowed if last and not last.ends else frozenset())
        last = fault
        self._inflict(job, fault)
        if not fault.ends:
          job.mark()
          continue
      elif fault is not None:
        self._decks[job.place].insert(0, fault)
      codes = job.codes()
      if not set(codes) <= allowed | {0}:
        raise UserError(
          f"{job.name} ended with the exit codes {codes}, after {last and last.name!r}:\n"
          f"{job.log()[-3000:]}"
        )
      if not any(codes):
        return
      assert last is not None
      self._tally(job, last).said = _answer(job.log(of_last_start=True))
      if arrived and last.after:
        last.after(job, self._rng)
      job.start()

  def _draw(self, job: Job) -> Fault:
    """Returns each kind once, in a random order, before any comes again."""
    deck = self._decks.setdefault(job.place, [])
    while True:
      for index, fault in enumerate(deck):
        if job.fresh or fault.moment != START:
          return deck.pop(index)
      kinds = list(FAULTS[job.place])
      self._rng.shuffle(kinds)
      deck += kinds

  def _arrive(self, job: Job, fault: Fault | None, last: Fault | None) -> bool:
    """Waits for the moment of a fault; returns whether it came before the run's end."""
    if fault is None:
      return job.wait_until(lambda: False)
    if fault.moment == START:
      longest = self._start_up.get(job.place, 10.0)
      moment = job.since + self._rng.uniform(0, longest)
      return job.wait_until(lambda: time.monotonic() > moment)
    if not job.wait_until(job.has_gone_on):
      return False
    seconds = time.monotonic() - job.since
    if job.fresh:
      self._start_up[job.place] = min(seconds, self._start_up.get(job.place, seconds))
    if last is not None:
      self._tally(job, last).seconds.append(seconds)
    if fault.moment == SAVE:
      return job.wait_until(job.saving)
    time.sleep(self._rng.uniform(0, 0.3))
    return job.wait_until(lambda: True)

  def _inflict(self, job: Job, fault: Fault) -> None:
    self.done += 1
    self._tally(job, fault).count += 1
    print(f"{self.done:4d}  {job.name:14s}  {fault.name}, at {job.newest()}", flush=True)
    fault.inflict(job, self._rng)

  def _tally(self, job: Job, fault: Fault) -> Tally:
    return self.tallies.setdefault((job.place, fault.name), Tally())

  def table(self) -> str:
    """Returns the kinds of faults, how often, and the seconds to the next checkpoint."""
    lines = [
      "place      fault                                times  seconds, median and most"
    ]
    for (place, name), tally in sorted(self.tallies.items()):
      seconds = tally.seconds
      times = f"{statistics.median(seconds):5.1f} {max(seconds):6.1f}" if seconds else ""
      lines.append(f"{place:9s}  {name:36s} {tally.count:5d}  {times}".rstrip())
      if tally.said:
        lines.append(f"           {tally.said[:200]}")
    return "\n".join(lines)


def _answer(log: str) -> str:
  """Returns the last line of a log that says why a run ended."""
  lines = [line for line in log.splitlines() if line.startswith("error: ")]
  return lines[-1] if lines else ""


def prove(root: pathlib.Path, campaign: Campaign, places: list[str]) -> list[str]:
  """Runs a campaign; prints its course, and returns what is wrong.

  Args:
    root: an empty directory.
    campaign: not begun.
    places: where, in turn.
  """
  arguments = kill_loop.train_arguments(root)
  arguments += [f"--config.{field}" for field in _QUIET]
  both = [*arguments, _TWO]
  with contextlib.ExitStack() as stack:
    calm = {}
    for place in sorted({"processes" if p == "processes" else "disk" for p in places}):
      kind, given = (Processes, both) if place == "processes" else (Job, arguments)
      calm[place] = _calm(kind(root, f"calm_{place}", given), stack)
    cloud = None
    if "bucket" in places:
      cloud = stack.enter_context(contextlib.closing(Cloud(root)))

    def make(place: str, name: str) -> Job:
      if place == "bucket":
        assert cloud is not None
        return Bucket(root, name, arguments, cloud)
      return (
        Processes(root, name, both)
        if place == "processes"
        else Job(root, name, arguments)
      )

    problems: list[str] = []
    for number, place in _turns(places):
      if campaign.over():
        break
      job = make(place, f"{place}_{number}")
      stack.callback(job.close)
      campaign.disturb(job)
      problems += _judge(calm["processes" if place == "processes" else "disk"], job)
    print(campaign.table())
    return problems


def _turns(places: list[str]) -> Iterator[tuple[int, str]]:
  number = 0
  while True:
    for place in places:
      yield number, place
    number += 1


def _calm(job: Job, stack: contextlib.ExitStack) -> pathlib.Path:
  """Trains a run undisturbed."""
  stack.callback(job.close)
  begun = time.monotonic()
  job.start()
  if any(job.codes()):
    raise UserError(f"{job.name} failed:\n{job.log()[-3000:]}")
  print(f"{job.name}: {time.monotonic() - begun:.0f} s", flush=True)
  return job.seen


def _judge(calm: pathlib.Path, job: Job) -> list[str]:
  """Returns what is wrong with a run that has come to its end."""
  problems = kill_loop.compare(calm, run_path(job.workdir))
  log = job.log()
  if (at := log.find("Traceback")) >= 0:
    shown = log[max(at - 500, 0) : at + 6000]
    problems.append(f"a traceback is in its log:\n{shown}")
  return [f"{job.name}: {problem}" for problem in problems]


def main() -> int:
  cli.get_config()  # a mistake in the flags is said here, not in a log
  values = flags.FLAGS.flag_values_dict()
  places = [place.strip() for place in values["where"]]
  if not places or not set(places) <= set(FAULTS):
    raise UserError(
      f"--where={','.join(places)}: give one or more of {', '.join(FAULTS)}."
    )
  given = values["workdir"]
  root = pathlib.Path(given or tempfile.mkdtemp(prefix="campaign_")).resolve()
  if root.is_dir() and any(root.iterdir()):
    raise UserError(f"--workdir={root} is not empty. Choose a new directory.")
  root.mkdir(parents=True, exist_ok=True)
  rng = random.Random(values["seed"])
  campaign = Campaign(rng, values["faults"], values["minutes"])
  try:
    problems = prove(root, campaign, places)
  finally:
    if not given:
      shutil.rmtree(root, ignore_errors=True)
  for problem in problems:
    print(f"DIFFERENT: {problem}")
  if not problems:
    print(f"identical after {campaign.done} faults")
  return 1 if problems else 0


def define_flags() -> None:
  cli.define_config()
  flags.DEFINE_integer(
    "faults", 30, "Number of faults to inflict.", lower_bound=1, upper_bound=100_000
  )
  flags.DEFINE_float(
    "minutes", 1e6, "Minutes after which no further fault is inflicted.", lower_bound=0
  )
  flags.DEFINE_integer(
    "seed", 0, "Random seed of the moments.", lower_bound=0, upper_bound=2**31 - 1
  )
  flags.DEFINE_list(
    "where", list(FAULTS), "Where to inflict them: disk, bucket, processes."
  )
  flags.DEFINE_bool("small", True, "Use a small model on a small generated text.")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
