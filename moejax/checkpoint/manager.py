"""Checkpoints: written asynchronously during training, restored bit for bit.

A save copies the arrays to the host, which is all the loop waits for. Orbax writes
them, and our `meta` with checksums of every array, in the background, under a temporary
name that becomes `N/` when complete. The newest few checkpoints and the few with the
lowest metric are kept.

In a single process a failed save is reported and cleaned up, and the run continues; with
several, the job ends. If a checkpoint is found to be damaged at restore, it is renamed
`N.damaged` and the previous one is used.

Reading is in `checkpoint.read`. `checkpoint.params` reads only parameters, e.g. for
evaluation; its functions are re-exported here.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as ocp_managers

from moejax.checkpoint import fingerprint
from moejax.checkpoint.orbax import (
  KeepBest,
  MetaSave,
  Place,
  StateHandler,
  is_refusal,
  reason,
)
from moejax.checkpoint.params import damaged_table, init_from, peek, restore_params
from moejax.checkpoint.read import (
  FORMAT,
  DamagedCheckpointError,
  empty_dicts,
  quiet,
  read_meta,
  read_step,
)
from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import ConfigError, UserError
from moejax.run import owner, provenance
from moejax.run.files import DIRECTORY, list_partial, list_steps, uncommit
from moejax.storage import errors as storage_errors
from moejax.storage.paths import RunPath, in_bucket, remove_tree, resolved

__all__ = [
  "DIRECTORY",
  "Checkpointer",
  "damaged_table",
  "init_from",
  "list_steps",
  "peek",
  "restore_params",
]

_State = TypeVar("_State", bound=Mapping[str, Any])

_POLL_SECONDS = 0.01
"""Polling interval for a save by several processes."""


class Checkpointer:
  """Saves and restores the train state of one run.

  All processes of a run create one, and call its methods in the same order.

  Attributes:
    failures: (step, reason) of every save that failed.
    blocked_seconds: how long the last `save` blocked its caller.
  """

  def __init__(
    self,
    directory: RunPath | str,
    *,
    keep_last: int,
    keep_best: int,
    config: Config,
    metadata: dict[str, Any],
    logical_axes: Any = None,
    untrained: Sequence[str] = (),
    warn: Callable[[str], None] = logging.warning,
  ):
    """Opens a directory of checkpoints and removes incomplete saves.

    Args:
      directory: `workdir / DIRECTORY`; created if missing.
      keep_last: newest steps to keep, at least 1.
      keep_best: number of steps of lowest metric to keep in addition.
      config: resolved config, stored with every step.
      metadata: more to store with every step: JSON, such as `dataset_fingerprint`.
      logical_axes: the model's; with it, checksums are kept for each expert.
      untrained: dotted names of parameters without optimizer moments; moments stored
        for them by earlier versions are not read.
      warn: called with one sentence per failure and how it was handled.

    Raises:
      ConfigError: keep_last < 1 or keep_best < 0.
    """
    if keep_last < 1 or keep_best < 0:
      raise ConfigError(
        f"--config.train.keep_last={keep_last} must be at least 1 (a run resumes from "
        f"its newest checkpoint) and --config.train.keep_best={keep_best} at least 0."
      )
    quiet()
    self.directory = resolved(directory)
    self.failures: list[tuple[int, str]] = []
    self.blocked_seconds = 0.0
    self._config = config_text.to_dict(config)
    self._metadata = json.loads(json.dumps(metadata))
    if jax.process_index() == 0:  # which writes them
      self._metadata["owner"] = owner.mark(config)
    self._logical_axes = logical_axes
    self._untrained = tuple(untrained)
    self._warn = warn
    self._pending: int | None = None
    self._told: list[Exception] = []
    """Errors reported by the writing threads."""
    self._alone = False
    """Whether a save failed in this process, unknown to the others."""
    self._clear_partial()
    self._metrics = self._read_metrics()
    policies: list[Any] = [ocp_managers.LatestN(keep_last)]
    if keep_best:
      policies.append(KeepBest(metrics=self._metrics, n=keep_best))
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add("state", ocp.args.StandardSave, StateHandler(self._told.append))
    self._manager = ocp.CheckpointManager(
      self.directory,
      handler_registry=handlers,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp_managers.AnyPreservationPolicy(policies),
        save_root_metadata=False,
        lightweight_initialize=True,
      ),
    )
    self._place = Place(self.directory)

  def save(
    self,
    step: int,
    state: Mapping[str, Any],
    *,
    position: dict[str, Any],
    metric: float | None = None,
    force: bool = False,
  ) -> bool:
    """Starts a save; the state may be donated as soon as this returns.

    Waits first for a save still being written. If either save fails, `warn` reports it
    and nothing is raised, unless there are other processes.

    Args:
      step: names the checkpoint.
      state: plain dict of jax arrays and optax states; typed PRNG keys are fine.
      position: data position after this step: JSON, the same on all processes.
      metric: for keep-best, lower is better; None or non-finite is never best.
      force: overwrite an existing step.

    Returns:
      Whether a save was started; False where the step is already there.

    Raises:
      UserError: this process could not write its part, and others wait for it.
    """
    start = time.monotonic()
    self.wait()
    try:
      if not self._makes_room(step, force):
        return False
    except Exception as e:
      if not storage_errors.is_theirs(e):
        raise
      self._failed(step, e)
      return False
    meta = self._metadata | {
      "format": FORMAT,
      "step": step,
      "position": position,
      "config": self._config,
      "versions": provenance.versions(),
      "revision": provenance.revision(),
      "empty": empty_dicts(state["params"]),
      "metric": float(metric) if metric is not None and np.isfinite(metric) else None,
    }
    try:
      axes = fingerprint.expert_axes(state, self._logical_axes)
      leaves = fingerprint.snapshot(state, axes)
      summed = None
      if jax.process_count() > 1:  # a collective must not run in a background thread
        summed = fingerprint.all_processes(fingerprint.checksums(leaves))
      self._metrics.pop(step, None)
      if meta["metric"] is not None:
        self._metrics[step] = meta["metric"]
      self._pending = step
      self._told.clear()

      def make_meta() -> dict[str, Any]:
        return meta | {"leaves": summed or fingerprint.checksums(leaves)}

      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=MetaSave(make_meta, self._told.append)
        ),
        force=True,
      )
    except Exception as e:
      if not (is_refusal(e) or storage_errors.is_theirs(e)):
        raise
      self._failed(step, e)
      return False
    finally:
      self.blocked_seconds = time.monotonic() - start
    return True

  def _makes_room(self, step: int, force: bool) -> bool:
    """Removes what blocks a save; returns False if the step exists and must stay."""
    if self.failures:
      self._clear_partial()
    if step not in self.steps():
      return True
    if force:
      self._manager.delete(step)
    return force

  def poll(self) -> bool:
    """Reports background saves that have failed, without waiting.

    Returns:
      True if no failure is known.
    """
    busy = self._manager.is_saving_in_progress() and not self._told
    return True if self._pending is None or busy else self.wait()

  def wait(self) -> bool:
    """Waits until the last save is on disk.

    Returns:
      False if it failed; it has then been reported and cleaned up.

    Raises:
      UserError: it failed in this process, and there are others.
    """
    step = self._pending
    if step is None:
      return True
    try:
      while jax.process_count() > 1 and self._manager.is_saving_in_progress():
        # Orbax would wait for the others, and they for this process.
        if self._told:
          raise self._told[0]
        time.sleep(_POLL_SECONDS)
      self._manager.wait_until_finished()
    except Exception as e:
      # No error while writing should end a (single-process) run.
      self._failed(step, e)
      return False
    self._pending = None
    return True

  def close(self) -> bool:
    """Waits for the last save, then frees Orbax's threads. Returns as `wait` does."""
    if self._alone:
      return False
    whole = self.wait()
    self._manager.close()
    if self.failures:
      self._clear_partial()
    return whole

  def steps(self) -> list[int]:
    """Complete checkpoints on disk, ascending."""
    return list_steps(self.directory)

  def latest(self) -> int | None:
    """The newest complete checkpoint."""
    return max(self.steps(), default=None)

  def restore(
    self, target: _State, step: int | None = None
  ) -> tuple[_State, dict[str, Any]]:
    """Restores the newest checkpoint that is intact.

    Newer damaged ones are renamed `N.damaged` and reported by `warn`, but only after an
    older one is restored: if none is intact, nothing is renamed.

    Args:
      target: the state's tree of ShapeDtypeStruct with shardings, of any mesh.
      step: the only step to try; None means the newest.

    Returns:
      The state, bit for bit and in the target's shardings, and its meta: step,
      position, config, versions, revision, metric, the content of `metadata`, and leaves.

    Raises:
      ConfigError: the checkpoint is of another model or optimizer.
      UserError: there is no checkpoint, no such step, or no intact one.
    """
    self.wait()
    steps = self.steps()
    if step is not None and step not in steps:
      raise UserError(
        f"{self.directory} has no step {step}. Its steps: {steps or 'none'}."
      )
    if not steps:
      raise UserError(f"{self.directory} has no checkpoint to restore.")
    damaged: list[tuple[int, str]] = []
    for candidate in [step] if step is not None else reversed(steps):
      state, meta, problem = self._try(candidate, target)
      if problem is None:
        for number, reason in damaged:
          self._set_aside(number, reason, candidate)
        return state, meta
      damaged.append((candidate, problem))
    reasons = "; ".join(f"step {n}: {reason}" for n, reason in damaged)
    raise UserError(
      f"{self.directory} has no intact checkpoint ({reasons}). Restore the files "
      "from a copy, or start anew in another --workdir."
    )

  def _try(
    self, step: int, target: Mapping[str, Any]
  ) -> tuple[Any, dict[str, Any], str | None]:
    """Restores one step, or returns a description of damage found by any process."""
    try:
      state, meta = read_step(
        self.directory / str(step), lambda meta: target, self._untrained
      )
    except DamagedCheckpointError as e:
      return {}, {}, str(e)
    return state, meta, None

  def _set_aside(self, step: int, reason: str, used: int) -> None:
    """Renames a damaged step, so that it is not used as a checkpoint again."""
    path = self.directory / str(step)
    aside = path.with_name(f"{step}.damaged")
    number = 0
    while aside.exists():
      number += 1
      aside = path.with_name(f"{step}.damaged.{number}")
    if jax.process_index() == 0:
      if in_bucket(path):
        uncommit(path)
      path.rename(aside)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"set_aside_{step}")
    self._metrics.pop(step, None)
    self._manager.reload()
    self._warn(
      f"checkpoint {path} is damaged ({reason}): set aside as {aside.name}, using "
      f"step {used}"
    )

  def _failed(self, step: int, error: Exception) -> None:
    """Handles a failed save: removes its files and reports the last good checkpoint.

    Raises:
      UserError: there are other processes, which may be waiting for this one in the
        same save; the job ends instead of hanging.
    """
    self._pending = None
    self._metrics.pop(step, None)
    why = (
      storage_errors.refusal(error, self.directory) if in_bucket(self.directory) else ""
    )
    why = why.rstrip(".") or reason(error)
    if is_refusal(error) or in_bucket(self.directory):
      pass
    elif self._place.is_gone():
      # Orbax misses one of its own files; which one depends on the timing.
      why = "its directory was removed"
    else:
      logging.warning("Unexpected error while saving:", exc_info=error)
    self.failures.append((step, why))
    what = f"checkpoint at step {step} could not be saved to {self.directory}"
    if jax.process_count() > 1:
      self._alone = True
      raise UserError(
        f"{what} by process {jax.process_index()} ({why}). The job ends, since all its "
        "processes must save; started again, it continues from the newest checkpoint."
      )
    self._warn(f"{what} ({why}): the run continues; {self._last_good()}")

  def _last_good(self) -> str:
    """Cleans up after a failed save; returns, in words, which checkpoint is left."""
    try:
      self._clear_partial()
      self._manager.reload()
      good = self.latest()
    except Exception as e:
      if not storage_errors.is_theirs(e):
        raise
      return "the list of checkpoints cannot be read now"
    if good is None:
      return "there is no checkpoint yet"
    return f"the last good checkpoint is step {good}"

  def _clear_partial(self, patience: float = 2.0) -> None:
    """Removes unfinished saves. No save may be in progress."""
    if jax.process_index() != 0:
      return
    deadline = time.monotonic() + patience
    # After one part of a save failed, Orbax's threads may still write another into
    # the directory that is being removed.
    while partial := list_partial(self.directory):
      for path in partial:
        remove_tree(path)
      if time.monotonic() > deadline:
        return
      time.sleep(0.05)

  def _read_metrics(self) -> dict[int, float]:
    """Reads the metrics of the steps on disk; damage is detected at restore."""
    found = {}
    for step in self.steps():
      try:
        metric = read_meta(self.directory / str(step)).get("metric")
      except (DamagedCheckpointError, UserError):
        continue
      if metric is not None:
        found[step] = metric
    return found
