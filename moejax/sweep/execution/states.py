"""The state of a run, read from its directory alone (except queued).

    waiting       nothing has been started
    queued        a batch system has a waiting job for it (slurm.py)
    running       a live process has locked the directory, or was started for it
    done          its last step is checkpointed and evaluated
    failed        its last attempt ended by itself, with an exit code other than 0
    interrupted   started but not over: stopped by a signal, or its machine was lost
    damaged       its evaluation cannot be read, or the directory holds another run

So a state is valid even after kill -9 of any process, and is the same from every shell.
The record `.sweep.json` adds what a run does not write about itself: when it was started,
by which process, and with which exit code it ended. Nothing here imports jax.
"""

import dataclasses
import enum
import json
import os
import socket
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moejax import files
from moejax.errors import UserError
from moejax.run import claim
from moejax.run.files import CONFIG_FILE, DIRECTORY, list_steps
from moejax.run.results import EVAL_FILE
from moejax.run.writers import METRICS_FILE
from moejax.sweep.execution import identity
from moejax.sweep.execution.identity import RECORD_FILE

LOG_FILE = "train.log"

TAIL_LINES = 15
"""Number of lines shown of a failed run's log."""

INTERRUPTIONS = frozenset({3, 129, 130, 137, 143, -1, -2, -9, -15})
"""Exit codes of a run that continues when it is started again: it was asked to stop
(128 + signal) or killed (-signal), or another process of its job was lost (3)."""

_METRICS_TAIL = 1 << 18
"""Bytes read from the end of metrics.jsonl: tens of lines, whatever their number."""
_LOG_TAIL = 1 << 14
_HEADER = "=== attempt "


class State(enum.StrEnum):
  WAITING = "waiting"
  QUEUED = "queued"
  RUNNING = "running"
  DONE = "done"
  FAILED = "failed"
  INTERRUPTED = "interrupted"
  DAMAGED = "damaged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
  """The status of a run, as read from its directory."""

  name: str
  path: Path
  state: State
  step: int = 0
  """Last logged step; of a finished run, its last step."""
  num_steps: int = 0
  """0 if unknown."""
  loss: float | None = None
  """Training loss of the last logged step, nats per token."""
  validation_loss: float | None = None
  """Newest validation loss, nats per token; of a finished run, the final evaluation's."""
  dropped: float | None = None
  """Fraction of assignments dropped at the last logged step."""
  seconds_left: float | None = None
  """Time left for a running run's steps, at its last logged speed."""
  flops_left: float = 0.0
  """Training FLOPs of the remaining steps; 0 if unknown."""
  flops_per_second: float | None = None
  """Speed at the last logged step."""
  exit_code: int | None = None
  """Exit code of the last attempt."""
  tail: tuple[str, ...] = ()
  """Last lines of a failed run's log."""
  damage: str = ""
  """One line naming a file that is unreadable or another run's, and the remedy."""
  note: str = ""
  """One line on what a finished run lacks."""
  job: str = ""
  """Id of its job in a batch system; "" if it has none."""
  reason: str = ""
  """Why that job waits, in the batch system's words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """Numbers needed for a run's status, known before it starts."""

  name: str
  digest: str
  """Of the point."""
  num_steps: int
  tokens_per_step: int
  flops_per_token: float
  """Training FLOPs per token: forward and backward."""


class DamagedError(UserError):
  """A file of the run cannot be read; the message says which, why and the remedy."""


def examine(path: Path) -> Status:
  """Returns the status of the run in a directory, which may be missing.

  Never raises because of the directory's content: see `Status.damage`.
  """
  damage, unknown = "", identity.trouble(path)
  is_strange = bool(unknown)
  try:
    record = read_record(path)
  except DamagedError as error:
    record, damage = {}, str(error)
  try:
    final = _read_final(path)
  except DamagedError as error:
    final, unknown = {}, unknown or str(error)
  workload = record.get("plan", {})
  name = str(workload.get("name") or path.name)
  if is_strange:  # The record may have come with the other run.
    name = path.name.rpartition("-")[0]
  num_steps = int(workload.get("num_steps") or _num_steps(path))
  attempts = record.get("attempts", [])
  last = attempts[-1] if attempts else {}
  state = _state(path, final, num_steps, last)
  if unknown and state is not State.RUNNING:
    state = State.DAMAGED
  shown = _progress(path, workload, num_steps, state)
  note = ""
  if state is State.DONE:
    if shown["step"] < num_steps:
      note = _cut_log(path, shown["step"], num_steps)
    shown |= {"step": int(final["step"]), "flops_left": 0.0}
    shown["validation_loss"] = _number(final.get("loss"))
  return Status(
    name=name,
    path=path,
    state=state,
    num_steps=num_steps,
    exit_code=last.get("exit_code"),
    tail=log_tail(path / LOG_FILE) if state is State.FAILED else (),
    damage=unknown or damage,
    note=note,
    **shown,
  )


def _cut_log(path: Path, step: int, num_steps: int) -> str:
  return (
    f"{path / METRICS_FILE} ends at step {step} of {num_steps}, though the run is done: "
    "its curve and the means over its tail lack the rest. Restore the file from a backup."
  )


def _state(path: Path, final: dict[str, Any], num_steps: int, last: Any) -> State:
  if claim.is_locked(path) or _is_alive(last):
    return State.RUNNING
  steps = list_steps(path / DIRECTORY)
  if num_steps and steps and final.get("step") == steps[-1] >= num_steps:
    return State.DONE
  code = last.get("exit_code")
  # Code 0 but not finished: its last checkpoint could not be saved.
  if code is not None and code not in INTERRUPTIONS:
    return State.FAILED
  begun = bool(steps) or (path / CONFIG_FILE).exists() or (path / METRICS_FILE).exists()
  return State.INTERRUPTED if last or begun else State.WAITING


def _progress(
  path: Path, workload: dict[str, Any], num_steps: int, state: State
) -> dict[str, Any]:
  """Returns the fields of `Status` that come from metrics.jsonl."""
  newest: dict[str, Any] = {}
  for line in _last_metrics(path / METRICS_FILE):
    newest = line | newest  # Goes backwards, so that newer values stay.
  step = min(int(newest.get("step", 0)), num_steps) if num_steps else 0
  tokens_left = max(num_steps - step, 0) * float(workload.get("tokens_per_step") or 0)
  rate = _number(newest.get("tokens_per_second"))
  running = state is State.RUNNING
  return {
    "step": step,
    "loss": _number(newest.get("loss")),
    "validation_loss": _number(newest.get("validation_loss")),
    "dropped": _number(newest.get("dropped_fraction")),
    "seconds_left": tokens_left / rate if running and rate else None,
    "flops_left": tokens_left * float(workload.get("flops_per_token") or 0),
    "flops_per_second": _number(newest.get("model_flops_per_second")),
  }


def _last_metrics(path: Path) -> Iterator[dict[str, Any]]:
  """Yields the last lines of a metrics file, newest first; none if there is no file."""
  for text in reversed(_end_of(path, _METRICS_TAIL).splitlines()):
    try:
      entry = json.loads(text)
    except ValueError:
      continue  # Torn by a crash, or cut in two by the limit.
    if isinstance(entry, dict) and isinstance(entry.get("step"), int):
      yield entry


def _end_of(path: Path, limit: int) -> str:
  try:
    with files.open_regular(path) as file:
      file.seek(max(os.fstat(file.fileno()).st_size - limit, 0))
      return file.read(limit).decode("utf-8", "replace")
  except OSError:
    return ""


def log_tail(path: Path) -> tuple[str, ...]:
  """Returns the last lines of a log, excluding earlier attempts."""
  lines = _end_of(path, _LOG_TAIL).splitlines()
  headers = [i for i, line in enumerate(lines) if line.startswith(_HEADER)]
  own = lines[headers[-1] + 1 :] if headers else lines
  return tuple(line for line in own if line.strip())[-TAIL_LINES:]


def log_header(number: int, command: str) -> str:
  """Returns the line that starts an attempt in a log."""
  now = time.strftime("%Y-%m-%d %H:%M:%S")
  return f"{_HEADER}{number}, {now}, {socket.gethostname()}: {command}\n"


# ----------------------------------------------------------------------- the record


def read_record(path: Path) -> dict[str, Any]:
  """Returns a run's record: `plan` and `attempts`; empty if there is none.

  Raises:
    DamagedError: it cannot be read.
  """
  remedy = "Delete it: the run's own files show how far it got."
  found = _read(path / RECORD_FILE, remedy)
  workload, attempts = found.get("plan", {}), found.get("attempts", [])
  if not (
    _is_workload(workload) and isinstance(attempts, list) and all(map(_is_try, attempts))
  ):
    raise DamagedError(f"{path / RECORD_FILE} is not a record of a sweep's run. {remedy}")
  return found


def _is_workload(workload: Any) -> bool:
  numbers = ("num_steps", "tokens_per_step", "flops_per_token")
  return isinstance(workload, dict) and all(
    _number(workload.get(name, 0)) is not None for name in numbers
  )


def _is_try(attempt: Any) -> bool:
  return isinstance(attempt, dict) and isinstance(
    attempt.get("exit_code"), int | types.NoneType
  )


def write_workload(path: Path, workload: Workload) -> None:
  """Stores a run's workload, and keeps its attempts."""
  record, values = read_record(path), dataclasses.asdict(workload)
  if record.get("plan") != values:
    files.write_json(path / RECORD_FILE, {"attempts": [], **record, "plan": values})


def begin(path: Path, pid: int, job: str = "") -> None:
  """Records that a process was started for the run.

  Args:
    path: the run's directory.
    pid: of the process.
    job: id of the batch system's job that it is part of; "" if none.
  """
  attempt: dict[str, Any] = {
    "start": time.time(),
    "host": socket.gethostname(),
    "pid": pid,
    "born": _born(pid),
    "end": None,
    "exit_code": None,
  }
  if job:
    attempt["job"] = job
  record = read_record(path)
  attempts = [*record.get("attempts", []), attempt]
  files.write_json(path / RECORD_FILE, {**record, "attempts": attempts})


def end(path: Path, exit_code: int) -> None:
  """Records how the last attempt ended; a negative code is a signal."""
  record = read_record(path)
  if not record.get("attempts"):
    raise DamagedError(f"{path / RECORD_FILE} has lost the attempt that has just ended.")
  *earlier, last = record["attempts"]
  last = {**last, "end": time.time(), "exit_code": exit_code}
  files.write_json(path / RECORD_FILE, {**record, "attempts": [*earlier, last]})


def num_attempts(path: Path) -> int:
  """Returns how often the run was started; 0 if its record is damaged."""
  try:
    return len(read_record(path).get("attempts", []))
  except DamagedError:
    return 0


def _read_final(path: Path) -> dict[str, Any]:
  remedy = "Delete it: the run then evaluates its last checkpoint again."
  found = _read(path / EVAL_FILE, remedy)
  if found and not isinstance(found.get("step"), int):
    raise DamagedError(
      f"{path / EVAL_FILE} does not have a whole number as its step. {remedy}"
    )
  return found


def _read(path: Path, remedy: str) -> dict[str, Any]:
  try:
    found = files.read_json(path)
  except (FileNotFoundError, NotADirectoryError):
    return {}
  except (OSError, ValueError) as error:
    raise DamagedError(f"{path} cannot be read ({error}). {remedy}") from error
  if not isinstance(found, dict):
    raise DamagedError(f"{path} does not contain a JSON object. {remedy}")
  return found


def _num_steps(path: Path) -> int:
  """Returns train.num_steps of a run without a record; 0 if unknown."""
  try:
    return int(files.read_json(path / CONFIG_FILE)["train"]["num_steps"])
  except (OSError, ValueError, KeyError, TypeError):
    return 0


def _number(value: Any) -> float | None:
  ok = isinstance(value, int | float) and not isinstance(value, bool)
  return float(value) if ok else None


# ------------------------------------------------------------------------ processes


def _is_alive(attempt: dict[str, Any]) -> bool:
  """Returns whether the process of an attempt runs on this host.

  A run locks its directory only after importing jax; until then only this shows it.
  """
  pid = attempt.get("pid")
  if attempt.get("exit_code") is not None or attempt.get("host") != socket.gethostname():
    return False
  if not isinstance(pid, int) or pid <= 0:
    return False
  # Process ids are reused, but an id with its start time is unique.
  return _born(pid) is not None and _born(pid) == attempt.get("born")


def _born(pid: int) -> str | None:
  """Returns a live process's start, unique together with its id; None if it is gone."""
  try:
    # The name in parentheses may contain spaces; the fields after it do not.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except FileNotFoundError:
    if Path("/proc/self/stat").exists():
      return None
  except OSError:
    return None
  else:
    return None if fields[0] in "ZX" else fields[19]
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except PermissionError:
    return "alive"
  return "alive"
