"""Step times of a sweep, in a separate pass: each distinct shape once, and alone.

Concurrent runs slow each other, and a run's own log does not show it. So after the sweep,
one process on the cores of one run compiles each shape and times its steps in turn.
WORKDIR/timing.json maps a shape's digest (moejax/sweep/execution/shapes.py) to:

    runs                names of the runs' directories with this shape
    step_ms, p50, p90   milliseconds of each timed step, and percentiles
    tokens_per_second   at p50
    compile_seconds     lowering and compiling, without any cache
    peak_memory_bytes   arguments and temporaries of the step, per device
    all_to_all_bytes    sent by a device in a step
    device_kind, num_devices, cores, versions, revision, ...   where it was measured

Nothing here imports jax.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax import files
from moejax.config import text as config_text
from moejax.errors import UserError
from moejax.sweep.execution import children, directory, local, shapes, states
from moejax.sweep.execution.view import Lines
from moejax.sweep.spec import Point

LOG_FILE = "timing.log"
_REQUEST = ".timing_request.json"
_RESULT = ".timing_result.json"
_MODULE = "moejax.sweep.execution.step_times"


def measure(
  workdir: Path,
  points: Sequence[Point],
  num_steps: int,
  slot: local.Slot,
  stream: Any = None,
) -> int:
  """Times the shapes that timing.json lacks, and updates it.

  Args:
    workdir: of the sweep, locked by this process; no run may be active.
    points: of the sweep.
    num_steps: timed steps of each shape.
    slot: cores or GPU of one run.
    stream: where progress is printed; None is standard output.

  Returns:
    0, 1 if the process failed, 128 + signal when stopped.

  Raises:
    UserError: timing.json is damaged.
  """
  view = Lines(sys.stdout if stream is None else stream)
  known = read(workdir)
  by_shape = group(points)
  missing = {digest: same[0] for digest, same in by_shape.items() if digest not in known}
  if missing:
    view.message(f"Timing {num_steps} steps of {len(missing)} shape(s).")
    queue = _One(_job(workdir, missing, num_steps))
    signal = children.work_off(queue, local.Pool([slot]))
    if signal is not None:
      return 128 + signal
    if queue.exit_code:
      log = workdir / LOG_FILE
      head = f"Timing failed (exit code {queue.exit_code}). The end of {log}:"
      print(head, *(f"  {x}" for x in states.log_tail(log)), sep="\n", file=sys.stderr)
      return 1
    known |= files.read_json(workdir / _RESULT)
    for name in (_REQUEST, _RESULT):
      (workdir / name).unlink(missing_ok=True)
  for digest, same in by_shape.items():
    known[digest] = known[digest] | {"runs": [point.directory for point in same]}
  files.write_json(workdir / directory.TIMING_FILE, known)
  for digest, same in by_shape.items():
    entry = known[digest]
    view.message(
      f"{entry['p50']:9.2f} ms a step (p90 {entry['p90']:.2f})  {same[0].name}"
      + (f" and {len(same) - 1} more" if len(same) > 1 else "")
    )
  return 0


def group(points: Sequence[Point]) -> dict[str, list[Point]]:
  """Returns the points of each shape, by the shape's digest."""
  out: dict[str, list[Point]] = {}
  for point in points:
    out.setdefault(shapes.shape_digest(point.config), []).append(point)
  return out


def read(workdir: Path) -> dict[str, dict[str, Any]]:
  """Returns the content of timing.json; empty if there is none.

  Raises:
    UserError: it cannot be read.
  """
  path = workdir / directory.TIMING_FILE
  remedy = "Delete it, and --time_steps measures them again."
  try:
    found = files.read_json(path)
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}). {remedy}") from error
  if not isinstance(found, dict) or not all(map(_is_entry, found.values())):
    raise UserError(f"{path} does not hold the step times of a sweep. {remedy}")
  return found


def _is_entry(entry: Any) -> bool:
  return isinstance(entry, Mapping) and all(
    isinstance(entry.get(name), int | float) for name in ("p50", "p90")
  )


def _job(workdir: Path, missing: Mapping[str, Point], num_steps: int) -> local.Job:
  configs = {digest: config_text.to_dict(p.config) for digest, p in missing.items()}
  request = {
    "configs": configs,
    "num_steps": num_steps,
    "output": str(workdir / _RESULT),
  }
  files.write_json(workdir / _REQUEST, request)
  return local.Job(
    name="timing",
    run=workdir,
    command=(sys.executable, "-m", _MODULE, str(workdir / _REQUEST)),
    log=workdir / LOG_FILE,
  )


class _One:
  """A queue of a single command."""

  def __init__(self, job: local.Job):
    self._job: local.Job | None = job
    self.exit_code: int | None = None

  def next(self, running: list[local.Job]) -> tuple[local.Job, int] | None:
    del running
    job, self._job = self._job, None
    return None if job is None else (job, 1)

  def is_empty(self) -> bool:
    return self._job is None

  def started(self, job: local.Job, pid: int) -> None:
    del job, pid

  def not_started(self, job: local.Job, error: OSError) -> None:
    print(f"{job.name} cannot be started: {error}", file=sys.stderr)
    self.exit_code = 1

  def ended(self, job: local.Job, exit_code: int) -> None:
    del job
    self.exit_code = exit_code

  def tick(self) -> None:
    pass
