"""Emergency checkpoints: the whole state, often, on this machine's own disk.

    DIR/RUN-HASH/process_I/STEP/meta/metadata   as in `checkpoint.read`, plus `parts`
    DIR/RUN-HASH/process_I/STEP/0.npy ...       see `local_parts`

Each process writes what its own devices hold, replicas included, and waits for no other,
since the processes share no disk here. A step is written under a temporary name and
renamed when complete. Processes communicate only to restore: they choose the newest step
that all of them wrote in the same start of the run, and use it if every part that a
device needs is there and has its checksum.

A step belongs to one run: its `run` is the id that process 0 writes into run.json with
the first emergency checkpoint. Steps of another id, config or text are never restored.
"""

import contextlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from moejax.checkpoint import fingerprint, local_parts
from moejax.checkpoint.orbax import is_refusal, reason
from moejax.checkpoint.read import (
  FORMAT,
  DamagedCheckpointError,
  agree,
  as_target,
  mismatches,
  pack_meta,
  read_meta,
)
from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import UserError
from moejax.run import emergency_dir, provenance
from moejax.run import workdir as workdir_lib
from moejax.storage import errors as storage_errors
from moejax.storage.paths import RunPath

_STEP = re.compile("0|[1-9][0-9]{0,8}")
_OFFERED = 8
"""Maximum number of steps that a process offers to the others."""
_ID_BYTES = 8

_Key = tuple[int, str]
"""A step, and the start of the run that wrote it."""


class EmergencyCheckpoints:
  """Saves the state to, and restores it from, a disk of this machine.

  All processes of a run create one, and call `restore` together.

  Attributes:
    every: steps between saves.
    directory: of this process's steps.
    failures: (step, reason) of every save that failed.
    late_lines: lines of the log that were stored with the restored step, and that the
      run's directory may lack.
    blocked_seconds: how long the last `save` blocked its caller.
  """

  def __init__(
    self,
    wish: emergency_dir.Wish,
    *,
    workdir: RunPath,
    config: Config,
    metadata: Mapping[str, Any],
    warn: Callable[[str], None] = logging.warning,
  ):
    """Opens the run's part of a directory and removes incomplete saves.

    Args:
      wish: names a directory on a disk of this machine; see `emergency_dir.check`.
      workdir: the run's directory.
      config: of the run, resolved.
      metadata: JSON that must be the same at a restore, such as `dataset_fingerprint`.
      warn: called with one sentence per failure and how it was handled.

    Raises:
      UserError: the directory cannot be written to, or belongs to another user.
    """
    self.every = wish.every
    self.failures: list[tuple[int, str]] = []
    self.late_lines: list[str] = []
    self.blocked_seconds = 0.0
    self._run = emergency_dir.of_run(wish.directory, workdir)
    self.directory = self._run / f"process_{jax.process_index()}"
    self._workdir, self._config = workdir, config
    self._metadata = dict(metadata)
    self._warn = warn
    self._thread: threading.Thread | None = None
    self._error: Exception | None = None
    self._step = -1
    self._failing = self._noted = False
    # With several processes, one may write a step while another still writes the last.
    self._keep = 2 if jax.process_count() == 1 else 3
    emergency_dir.make_own(self._run, wish.directory)
    emergency_dir.make(self.directory, wish.directory)
    for path in self.directory.glob(".*"):
      shutil.rmtree(path, ignore_errors=True)
    self._id, self._session = self._ids()

  def _ids(self) -> tuple[str, str]:
    """Returns the run's id and this start's id, both chosen by process 0."""
    ids = bytes(2 * _ID_BYTES)
    if jax.process_index() == 0:
      known = workdir_lib.emergency_id(self._workdir)
      ids = bytes.fromhex(known) if known else secrets.token_bytes(_ID_BYTES)
      ids += secrets.token_bytes(_ID_BYTES)
    if jax.process_count() > 1:
      numbers = np.frombuffer(ids, np.uint8).astype(np.int32)
      told = np.asarray(multihost_utils.broadcast_one_to_all(numbers))
      ids = told.astype(np.uint8).tobytes()
    return ids[:_ID_BYTES].hex(), ids[_ID_BYTES:].hex()

  # ------------------------------------------------------------------------- saving

  def due(self, step: int) -> bool:
    """Returns whether to save a step."""
    return step % self.every == 0

  def save(
    self,
    step: int,
    state: Mapping[str, Any],
    position: dict[str, Any],
    late_lines: Sequence[str] = (),
  ) -> None:
    """Starts a save; the state may be donated as soon as this returns.

    Waits first for a save still being written. A failure is reported by `warn`, once
    until a save succeeds again, and the run continues, also with several processes.

    Args:
      step: names the checkpoint.
      state: plain dict of jax arrays and optax states.
      position: data position after this step: JSON.
      late_lines: lines of the log that could not yet be written to the run's directory.
    """
    start = time.monotonic()
    self.wait()
    self._note()
    leaves = fingerprint.named_leaves(state)
    parts = {name: local_parts.held(leaf) for name, leaf in leaves.items()}
    meta = self._metadata | {
      "format": FORMAT,
      "step": step,
      "position": position,
      "late_lines": list(late_lines),
      "run": self._id,
      "session": self._session,
      "config": config_text.to_dict(self._config),
      "versions": provenance.versions(),
      # `read_meta` requires a sum; here each part has its own.
      "leaves": {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sum": "0"}
        for name, leaf in leaves.items()
      },
    }
    self._step = step
    self._thread = threading.Thread(
      target=self._write, args=(step, parts, meta), name="emergency_checkpoint"
    )
    self._thread.start()
    self.blocked_seconds = time.monotonic() - start

  def wait(self) -> bool:
    """Waits until the last save is on disk; False if it failed, which is reported."""
    if self._thread is None:
      return not self._failing
    self._thread.join()
    self._thread = None
    error, self._error = self._error, None
    if error is None:
      self._failing = False
      return True
    why = reason(error)
    if not is_refusal(error):
      logging.warning("Unexpected error while saving:", exc_info=error)
    self.failures.append((self._step, why))
    if not self._failing:
      self._warn(
        f"emergency checkpoint at step {self._step} could not be saved to "
        f"{self.directory} ({why}): the run continues, and tries again every "
        f"{self.every} steps"
      )
    self._failing = True
    return False

  def clear(self) -> None:
    """Removes this process's steps, which are useless once the run is done."""
    self.wait()
    shutil.rmtree(self.directory, ignore_errors=True)
    # Another process of this machine may not yet have removed its own.
    with contextlib.suppress(OSError):
      self._run.rmdir()

  def _note(self) -> None:
    """Writes the run's id to where the next start looks for it."""
    if self._noted or jax.process_index() != 0:
      return
    try:
      workdir_lib.note_emergency(self._workdir, self._id)
      self._noted = True
    except Exception as error:
      if not (is_refusal(error) or storage_errors.is_theirs(error)):
        raise
      logging.warning("run.json could not be written (%s).", reason(error))

  def _write(
    self, step: int, parts: dict[str, list[local_parts.Part]], meta: dict[str, Any]
  ) -> None:
    """Writes a step in the background, under a name that readers ignore."""
    temporary = self.directory / f".{step}.{self._session}"
    final = self.directory / str(step)
    try:
      (temporary / "meta").mkdir(parents=True)
      stored: dict[str, list[local_parts.Entry]] = {}
      number = 0
      for name, held in parts.items():
        stored[name] = local_parts.store(temporary, held, number)
        number += len(held)
      text = pack_meta(meta | {"parts": stored}).encode()
      local_parts.write_file(
        temporary / "meta" / "metadata", lambda file: file.write(text)
      )
      shutil.rmtree(final, ignore_errors=True)
      temporary.rename(final)
      _sync(self.directory)
      self._prune(step)
    except Exception as error:
      self._error = error
      shutil.rmtree(temporary, ignore_errors=True)

  def _prune(self, newest: int) -> None:
    """Removes all but the newest steps up to this one."""
    steps = _steps(self.directory)
    kept = [s for s in steps if s <= newest][-self._keep :]
    for step in set(steps) - set(kept):
      shutil.rmtree(self.directory / str(step), ignore_errors=True)
    for path in self._run.glob("process_*"):
      number = path.name.removeprefix("process_")
      if number.isdecimal() and int(number) >= jax.process_count():
        shutil.rmtree(path, ignore_errors=True)

  # ---------------------------------------------------------------------- restoring

  def restore(self, target: Any, newer_than: int | None = None) -> Any | None:
    """Restores the newest step that all processes have. Every process calls it.

    Steps that are damaged, incomplete or of another run are skipped, and reported by
    `warn`.

    Args:
      target: the state's tree of ShapeDtypeStruct with shardings, of any mesh for which
        this machine holds what its devices need.
      newer_than: a step that is stored elsewhere: only newer ones are restored. None
        allows any.

    Returns:
      The state, bit for bit and in the target's shardings; None if there is none.
    """
    target = as_target(target)
    found = self._found(-1 if newer_than is None else newer_than, target)
    for key in _common(sorted(found)):
      try:
        damage, bits = None, {}
        try:
          bits = _read(found[key], target)
        except DamagedCheckpointError as error:
          damage = error
        agree(damage)
      except DamagedCheckpointError as error:
        self._pass_over(str(error), [found[key][0]])
        continue
      for path in found[key]:
        self.late_lines += read_meta(path).get("late_lines", [])
      return jax.tree_util.tree_map_with_path(
        lambda path, leaf, bits=bits: local_parts.placed(
          leaf, bits[fingerprint.leaf_name(path)]
        ),
        target,
      )
    return None

  def _found(self, floor: int, target: Any) -> dict[_Key, list[Path]]:
    """Returns the steps after `floor` that any process of this run wrote here."""
    found: dict[_Key, list[Path]] = {}
    problems: dict[str, list[Path]] = {}
    for path in sorted(self._run.glob("process_*/*")):
      if not _STEP.fullmatch(path.name) or int(path.name) <= floor:
        continue
      try:
        meta = read_meta(path)
        problem = self._foreign(meta, target)
      except (DamagedCheckpointError, UserError) as error:
        meta, problem = {}, str(error)
      if problem:
        problems.setdefault(problem, []).append(path)
      else:
        found.setdefault((int(path.name), meta["session"]), []).append(path)
    for problem, paths in problems.items():
      self._pass_over(problem, paths)
    return found

  def _pass_over(self, problem: str, paths: list[Path]) -> None:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    self._warn(f"emergency checkpoint {paths[0]}{more} is skipped: {problem}")

  def _foreign(self, meta: dict[str, Any], target: Any) -> str:
    """Returns why a step does not belong to this run; empty if it does."""
    if meta.get("run") != self._id:
      return f"it belongs to another run than {self._workdir}"
    for name, value in self._metadata.items():
      if meta.get(name) != value:
        return f"its {name.replace('_', ' ')} differs"
    try:
      old = config_text.from_dict(meta["config"])
    except ValueError as error:
      return f"its config cannot be read: {error}"
    refused = workdir_lib.refused_changes(old, self._config)
    if refused:
      name, was, now = refused[0]
      return f"--config.{name} was {was!r} and is now {now!r}"
    return "; ".join(mismatches(meta["leaves"], target)[:3])


def _sync(directory: Path) -> None:
  """Makes a rename in a directory survive a loss of power."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _steps(directory: Path) -> list[int]:
  return sorted(int(p.name) for p in directory.iterdir() if _STEP.fullmatch(p.name))


def _common(keys: list[_Key]) -> list[_Key]:
  """Returns the keys that all processes have, the newest first; a collective."""
  newest = keys[::-1][:_OFFERED]
  if jax.process_count() == 1:
    return newest
  rows = np.full((_OFFERED, 1 + _ID_BYTES), -1, np.int32)
  for row, (step, session) in zip(rows, newest, strict=False):
    row[0], row[1:] = step, list(bytes.fromhex(session))
  tables = np.asarray(multihost_utils.process_allgather(rows)).tolist()
  offers = [{tuple(row) for row in table if row[0] >= 0} for table in tables]
  shared = sorted(set.intersection(*offers), reverse=True)
  return [(step, bytes(session).hex()) for step, *session in shared]


def _read(paths: list[Path], target: Any) -> dict[str, list[np.ndarray]]:
  """Reads the parts that this process's devices need, from the files of one start.

  Raises:
    DamagedCheckpointError: a part is missing here, or not as written.
  """
  try:
    stored: dict[str, list[tuple[Path, local_parts.Entry]]] = {}
    for path in paths:
      for name, entries in read_meta(path)["parts"].items():
        stored.setdefault(name, []).extend((path, entry) for entry in entries)
    return {
      name: local_parts.read(name, leaf, stored[name])
      for name, leaf in fingerprint.named_leaves(target).items()
    }
  except (KeyError, TypeError, AttributeError) as error:
    raise DamagedCheckpointError(f"its list of parts is invalid: {error}") from error
