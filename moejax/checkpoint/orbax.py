"""Orbax extensions: the meta item, the retention policy, and write errors."""

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import future as ocp_future

from moejax.checkpoint.read import pack_meta, read_meta
from moejax.storage.full import is_full
from moejax.storage.paths import RunPath, in_bucket, run_path, write_bytes


class _Told:
  """A future that reports its failure immediately.

  Orbax reports a failed write only after all processes synchronise at the end of the
  save, but those that wrote their parts wait elsewhere: ten minutes without a message.
  """

  def __init__(self, future: Any, tell: Callable[[Exception], None]):
    self._future, self._tell = future, tell

  def result(self, timeout: float | None = None) -> Any:
    try:
      return self._future.result(timeout=timeout)
    except Exception as error:
      self._tell(error)
      raise

  def cancel(self) -> bool | None:
    return self._future.cancel()


class _MetaHandler(ocp.AsyncCheckpointHandler):
  """Writes `meta/metadata`, whose content is computed in the background too."""

  async def async_save(self, directory: Any, args: "MetaSave") -> list[Any]:
    future = ocp_future.CommitFutureAwaitingContractedSignals(
      self._write(directory, args), name="moejax_meta_save"
    )
    return [_Told(future, args.tell)]

  def save(self, directory: Any, args: "MetaSave") -> None:
    asyncio.run(self._write(directory, args))

  def restore(self, directory: Any, args: Any = None) -> dict[str, Any]:
    return read_meta(run_path(os.fspath(directory)).parent)

  async def _write(self, directory: Any, args: "MetaSave") -> None:
    if jax.process_index() == 0:
      path = run_path(os.fspath(directory)) / "metadata"
      if in_bucket(path):
        write_bytes(path, pack_meta(args.make()).encode())
      else:
        path.write_text(pack_meta(args.make()))


@ocp.args.register_with_handler(_MetaHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class MetaSave(ocp.args.CheckpointArgs):
  """The meta item of a save: a function called in the background after the loop has
  continued, and a callback for its failure in that thread."""

  make: Callable[[], dict[str, Any]]
  tell: Callable[[Exception], None]


class StateHandler(ocp.StandardCheckpointHandler):
  """Orbax's handler, but reports failures in the thread where they occur."""

  def __init__(self, tell: Callable[[Exception], None]):
    super().__init__()
    self._tell = tell

  @classmethod
  def typestr(cls) -> str:
    # The format is the same, so the name of the handler stays the same.
    return ocp.StandardCheckpointHandler.typestr()

  async def async_save(self, *args: Any, **kwargs: Any) -> list[Any]:
    futures = await super().async_save(*args, **kwargs)
    return [_Told(future, self._tell) for future in futures or []]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepBest:
  """Keeps the n steps of lowest metric, ignoring steps without one.

  Not Orbax's BestN, which reads its own metrics file of every step at the start: a
  damaged one would prevent a run from starting.
  """

  metrics: dict[int, float]
  n: int

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    known = [c.step for c in checkpoints if np.isfinite(self.metrics.get(c.step, np.inf))]
    # Of equal metrics the earlier one, which does not push another out.
    best = sorted(known, key=lambda step: (self.metrics[step], step))[: self.n]
    return [c.step in best for c in checkpoints]


_FULL = ("No space left", "RESOURCE_EXHAUSTED", "File too large", "quota")
_GONE = ("NOT_FOUND", "No such file or directory")
"""Parts of TensorStore's messages for a directory that was removed during a save."""


class Place:
  """A directory on a disk, to detect its removal during a save."""

  def __init__(self, directory: RunPath):
    self._directory = directory
    self._inode = self._found()

  def is_gone(self) -> bool:
    """Returns whether the directory is missing or replaced; a removal takes a moment."""
    for _ in range(5):
      if not self._inode or self._found() != self._inode:
        return True
      time.sleep(0.02)
    return False

  def _found(self) -> int:
    """Returns the directory's inode; 0 if there is none, as in a bucket."""
    try:
      return 0 if in_bucket(self._directory) else os.stat(self._directory).st_ino
    except FileNotFoundError:
      return 0


def is_refusal(error: Exception) -> bool:
  """Returns whether the file system refused, as opposed to an error in the state."""
  return isinstance(error, OSError) or any(
    word in str(error) for word in (*_FULL, *_GONE)
  )


def reason(error: Exception) -> str:
  """Returns why a write failed, in a few words."""
  if is_full(error):
    return "the disk is full"
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 200 else text[:197] + "..."
