"""What `tools.campaign` does to a run, where, when, and how the run may answer."""

import dataclasses
import pathlib
import random
import signal
import time
from collections.abc import Callable

from moejax.errors import PEER_LOST, UserError
from moejax.run.files import DIRECTORY
from tools.campaign_jobs import Bucket, Job

_KILLED = -signal.SIGKILL
_DAY = 86_400.0

START, SAVE, STEP = "start", "save", "step"
"""Moments: during the start-up, while a checkpoint is written, after one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
  """One kind of fault."""

  name: str
  inflict: Callable[[Job, random.Random], None]
  moment: str = STEP
  ends: bool = True
  """Whether the run must end; else it may also go on."""
  codes: frozenset[int] = frozenset()
  """Exit codes of its processes, beside 0."""
  after: Callable[[Job, random.Random], None] | None = None
  """Once all processes have ended, before the next start."""


def _kill(*indices: int) -> Callable[[Job, random.Random], None]:
  return lambda job, rng: job.signal(signal.SIGKILL, *indices)


def _terminate(job: Job, rng: random.Random) -> None:
  job.signal(signal.SIGTERM, rng.randrange(job.count))


def _pause(job: Job, rng: random.Random) -> None:
  one = rng.randrange(job.count)
  job.signal(signal.SIGSTOP, one)
  time.sleep(rng.uniform(0.5, 4.0))
  job.signal(signal.SIGCONT, one)


def _shift_clock(job: Job, rng: random.Random) -> None:
  """A second, an hour, a day or ten years, forward or back."""
  seconds = rng.choice((1.0, 3600.0, _DAY, 3650 * _DAY)) * rng.choice((-1, 1))
  job.clock.write_text(str(seconds))
  time.sleep(1.0)


def _damage(job: Job, rng: random.Random) -> None:
  """Changes a byte of a file of the newest checkpoint, cuts the file, or removes it."""
  steps = job.steps()
  if len(steps) < 2:  # the only one: what is left would be no run
    return
  newest = job.seen / DIRECTORY / str(steps[-1])
  files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size]
  _spoil(rng.choice(sorted(files)), rng)


def _spoil(file: pathlib.Path, rng: random.Random) -> None:
  size = file.stat().st_size
  match rng.randrange(3):
    case 0:
      file.unlink()
    case 1:
      with file.open("r+b") as opened:
        opened.truncate(rng.randrange(size))
    case _:
      with file.open("r+b") as opened:
        at = rng.randrange(size)
        opened.seek(at)
        byte = opened.read(1)[0] ^ (1 << rng.randrange(8))
        opened.seek(at)
        opened.write(bytes([byte]))


def _vanish(job: Job, rng: random.Random) -> None:
  job.vanish()


def _clear(job: Job, rng: random.Random) -> None:
  """Removes what the last moments of the run wrote after its directory was gone."""
  job.vanish()


def _of_bucket(**changes: object) -> Callable[[Job, random.Random], None]:
  """Returns what changes fields of the proxy's faults for some seconds."""

  def inflict(job: Job, rng: random.Random) -> None:
    assert isinstance(job, Bucket)
    faults = job.cloud.faults
    before = {name: getattr(faults, name) for name in changes}
    for name, value in changes.items():
      setattr(faults, name, value)
    time.sleep(rng.uniform(2.0, 6.0))
    for name, value in before.items():
      setattr(faults, name, value)

  return inflict


def _restart_service(job: Job, rng: random.Random) -> None:
  assert isinstance(job, Bucket)
  job.cloud.stop()
  time.sleep(rng.uniform(0.5, 3.0))
  job.cloud.start()


_EVERYWHERE = (
  Fault(
    name="SIGKILL in the start-up",
    inflict=_kill(),
    moment=START,
    codes=frozenset({_KILLED}),
  ),
  Fault(
    name="SIGKILL during a save",
    inflict=_kill(),
    moment=SAVE,
    codes=frozenset({_KILLED}),
  ),
  Fault(name="SIGKILL after a checkpoint", inflict=_kill(), codes=frozenset({_KILLED})),
  Fault(
    name="SIGTERM",
    inflict=_terminate,
    # -SIGTERM: during the final evaluation, when nothing is left to save.
    codes=frozenset({128 + signal.SIGTERM, -signal.SIGTERM}),
  ),
  Fault(name="SIGSTOP for some seconds", inflict=_pause, ends=False),
  Fault(name="clock shifted", inflict=_shift_clock, ends=False),
  Fault(
    name="checkpoint damaged",
    inflict=_kill(),
    codes=frozenset({_KILLED}),
    after=_damage,
  ),
  Fault(
    name="directory removed",
    inflict=_vanish,
    codes=frozenset({UserError.exit_code, PEER_LOST}),
    after=_clear,
  ),
)

# SIGABRT: the runtime's own end, where it is quicker than ours to miss process 0.
_LOST = frozenset({_KILLED, PEER_LOST, -signal.SIGABRT})
_REFUSED = frozenset({UserError.exit_code})

FAULTS: dict[str, tuple[Fault, ...]] = {
  "disk": _EVERYWHERE,
  "bucket": (
    *_EVERYWHERE,
    Fault(
      name="requests refused (429, 500, 503)",
      inflict=_of_bucket(refused=1.0),
      ends=False,
      codes=_REFUSED,
    ),
    Fault(
      name="answers late, lost or cut",
      inflict=_of_bucket(latency=0.4, lost=0.15, cut=0.15),
      ends=False,
      codes=_REFUSED,
    ),
    Fault(
      name="bucket full (403)", inflict=_of_bucket(full=403), ends=False, codes=_REFUSED
    ),
    Fault(
      name="bucket full (507)", inflict=_of_bucket(full=507), ends=False, codes=_REFUSED
    ),
    Fault(name="service restarted", inflict=_restart_service, ends=False, codes=_REFUSED),
  ),
  "processes": (
    *_EVERYWHERE,
    Fault(name="SIGKILL of process 0", inflict=_kill(0), codes=_LOST),
    Fault(name="SIGKILL of process 1", inflict=_kill(1), codes=_LOST),
    Fault(
      name="SIGKILL of process 1 during a save",
      inflict=_kill(1),
      moment=SAVE,
      codes=_LOST,
    ),
  ),
}
"""By place."""
