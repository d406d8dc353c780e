"""Reads a checkpoint and verifies that it is what was written.

A step is a directory `N/` with two items: `state/`, the arrays as Orbax stores
them, and `meta/metadata`, one JSON file of ours:

  {"crc32": of the rest, "meta": {"format", "step", "position", "config",
   "versions", "revision", "dataset_fingerprint", "metric", "leaves", "empty"}}

`empty` names the empty parameter dicts. `leaves` has shape, dtype and checksum of every
array (`fingerprint.checksums`). Targets are compared with `leaves`, not with Orbax's own
metadata, so that a checkpoint of another model (a user error) and a damaged one (a disk
error) are never confused.
"""

import contextlib
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moejax import files
from moejax.checkpoint import fingerprint, orbax_loop
from moejax.errors import ConfigError, UserError
from moejax.storage import errors as storage_errors
from moejax.storage.paths import RunPath, in_bucket

FORMAT = 1
"""Incremented when `meta` changes so that an older reader would misread it."""


_META = {"format": int, "step": int, "config": dict, "leaves": dict}
"""Required fields and their JSON types."""


class _NotOrbax(logging.Filter):
  """Drops Orbax's own lines: dozens per save, and tracebacks of errors that we report."""

  def filter(self, record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or record.levelno > logging.ERROR


def quiet() -> None:
  """Keeps Orbax from writing over the progress bar. Its errors still reach us."""
  orbax_loop.install()
  logger = logging.getLogger("absl")
  if not any(isinstance(f, _NotOrbax) for f in logger.filters):
    logger.addFilter(_NotOrbax())


class DamagedCheckpointError(Exception):
  """The files on disk are not as they were written. Names the step and the reason."""


def agree(damage: DamagedCheckpointError | None) -> None:
  """Raises in every process if any of them found damage.

  Called before each collective, in which the other processes would otherwise wait forever
  for one that failed.
  """
  found = damage is not None
  if jax.process_count() > 1:
    found = bool(np.any(multihost_utils.process_allgather(np.array(found))))
  if found:
    raise damage or DamagedCheckpointError("another process found it damaged")


def pack_meta(meta: dict[str, Any]) -> str:
  """Returns the text of a meta file, including its checksum."""
  body = json.dumps(meta, sort_keys=True)
  return f'{{"crc32": {zlib.crc32(body.encode())}, "meta": {body}}}\n'


def read_meta(step_directory: RunPath) -> dict[str, Any]:
  """Reads the `meta` of a step.

  Raises:
    DamagedCheckpointError: the file is missing, cut short or changed.
    UserError: it was written by a newer version in an unknown form, or reading it is not
      permitted.
  """
  path = step_directory / "meta" / "metadata"
  try:
    with storage_errors.explained(path, flag=""):
      stored = files.read_json(path)
    meta = stored["meta"]
    body = json.dumps(meta, sort_keys=True)
    if stored["crc32"] != zlib.crc32(body.encode()):
      raise ValueError("its checksum does not match")
    # Only a newer version can check a newer format.
    if not meta["format"] > FORMAT:
      _check_meta(meta)
  except FileNotFoundError as e:
    raise DamagedCheckpointError(f"{path} is missing") from e
  except PermissionError as e:
    raise _not_permitted(path) from e
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
    raise DamagedCheckpointError(f"{path} has changed: {_one_line(e)}") from e
  if meta["format"] > FORMAT:
    raise UserError(
      f"{step_directory} was written in checkpoint format {meta['format']}, but this "
      f"version reads formats up to {FORMAT}: use the moejax that wrote it "
      f"({meta.get('versions', {}).get('moejax', 'unknown')}) or a later one."
    )
  return meta


def _check_meta(meta: dict[str, Any]) -> None:
  """Rejects a hand-made file whose checksum is valid but whose content is not.

  Raises:
    ValueError, KeyError, TypeError: a required field is missing or of another type.
  """
  for name, kind in _META.items():
    if type(meta[name]) is not kind:
      raise ValueError(f"{name} is not of type {kind.__name__}")
  for name, leaf in meta["leaves"].items():
    shape, dtype = leaf["shape"], leaf["dtype"]
    if not all(type(size) is int and 0 <= size < 2**40 for size in shape):
      raise ValueError(f"{name} has shape {shape}")
    if type(dtype) is not str:
      raise ValueError(f"{name} has dtype {dtype}")
    if not dtype.startswith("key<") and not _is_number(np.dtype(dtype)):
      raise ValueError(f"{name} has dtype {dtype}")
    int(leaf["sum"], 16)


def _is_number(dtype: np.dtype) -> bool:
  """Returns whether a dtype is numeric; bfloat16 etc. have kind V but are not void."""
  return dtype.kind in "biufcV" and dtype.type is not np.void


def as_target(tree: Any) -> Any:
  """Returns shapes, dtypes and shardings to restore into; by default one local device."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def spec(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or device
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(spec, tree)


def empty_dicts(tree: Any, prefix: str = "params") -> list[str]:
  """Returns the names of empty dicts, which no leaf name records."""
  if not isinstance(tree, dict):
    return []
  if not tree:
    return [prefix]
  return [n for key, node in tree.items() for n in empty_dicts(node, f"{prefix}.{key}")]


def mismatches(saved: dict[str, Any], target: Any, *, prefix: str = "") -> list[str]:
  """Returns how a checkpoint's leaves differ from a target's, in words; empty if not."""
  wanted = {prefix + n: leaf for n, leaf in fingerprint.named_leaves(target).items()}
  stored = {n: s for n, s in saved.items() if n.startswith(prefix)}
  lines = [f"{n} is not in the checkpoint" for n in wanted if n not in stored]
  lines += [f"{n} is only in the checkpoint" for n in stored if n not in wanted]
  for name in sorted(wanted.keys() & stored.keys()):
    was = (tuple(stored[name]["shape"]), stored[name]["dtype"])
    now = (tuple(wanted[name].shape), str(wanted[name].dtype))
    if was != now:
      lines.append(f"{name} is {was[1]}{list(was[0])}, wanted {now[1]}{list(now[0])}")
  return lines


def read_step(
  step_directory: RunPath,
  target_of: Callable[[dict[str, Any]], Any],
  untrained: Sequence[str] = (),
) -> tuple[Any, dict[str, Any]]:
  """Restores a step. Every process calls it, and all of them succeed or none.

  Args:
    step_directory: `.../checkpoints/N`.
    target_of: (the step's meta) -> the target for `read_state`.
    untrained: as for `read_state`.

  Returns:
    The state and the meta.

  Raises:
    ConfigError, DamagedCheckpointError: as `read_meta` and `read_state`.
  """
  damage, meta = None, {}
  try:
    meta = read_meta(step_directory)
  except DamagedCheckpointError as e:
    damage = e
  agree(damage)
  return read_state(step_directory, meta, target_of(meta), untrained), meta


def read_state(
  step_directory: RunPath,
  meta: dict[str, Any],
  target: Any,
  untrained: Sequence[str] = (),
) -> Any:
  """Restores arrays bit for bit, straight into the target's shardings.

  No full array is materialised unless requested: each device gets only its shard.

  Args:
    step_directory: `.../checkpoints/N`.
    meta: of that step, from `read_meta`.
    target: tree of ShapeDtypeStruct, with all or some of the saved tree's top-level keys.
    untrained: dotted names of parameters whose moments are not read; earlier versions
      stored unused moments for them.

  Raises:
    ConfigError: the target is another model or optimizer (the message names the leaves),
      or it includes an optimizer's state and the checkpoint holds parameters only.
    DamagedCheckpointError: the arrays cannot be read, or are not those written.
  """
  saved = meta["leaves"]
  parts = tuple(f"{key}." for key in target)
  unread = tuple(f".{name}" for name in untrained)
  wanted = {
    name: leaf
    for name, leaf in saved.items()
    if (name in target or name.startswith(parts))
    and not (name.startswith("opt_state.") and name.endswith(unread))
  }
  problems = mismatches(wanted, target)
  if problems and set(target) != {"params"} and _only_parameters(saved):
    workdir = step_directory.parent.parent
    raise ConfigError(
      f"{step_directory} holds only parameters, without the optimizer state to continue. "
      f"Start a new run from them: --init_from={workdir} --workdir=NEXT."
    )
  if problems:
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    raise ConfigError(
      f"{step_directory} holds another model or optimizer: "
      f"{'; '.join(problems[:5])}{more}. Use the --config it was made with."
    )
  damage, state = None, None
  try:
    state = _read_arrays(step_directory / "state", as_target(target))
  except Exception as e:
    if _is_refused(e):
      raise _not_permitted(step_directory) from e
    if _is_memory(e):
      raise
    # A bucket that does not answer is not damaged.
    if in_bucket(step_directory) and (why := storage_errors.refusal(e, step_directory)):
      raise UserError(f"{step_directory}: {why}") from e
    damage = DamagedCheckpointError(f"its arrays cannot be read: {_one_line(e)}")
    damage.__cause__ = e
  agree(damage)
  found = fingerprint.verified(state, saved_expert_axes(wanted))
  changed = fingerprint.differences(wanted, found)
  if changed:
    more = f" (and {len(changed) - 5} more)" if len(changed) > 5 else ""
    raise DamagedCheckpointError(f"{'; '.join(changed[:5])}{more}")
  return state


def _only_parameters(leaves: Iterable[str]) -> bool:
  return all(name.startswith("params.") for name in leaves)


def _read_arrays(directory: Any, target: Any) -> Any:
  quiet()
  args = ocp.args.PyTreeRestore(
    item=target,
    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
    partial_restore=True,
  )
  # Not through Orbax's Checkpointer, whose restore ends in a barrier: if one process
  # cannot read its part, the others would wait for it there.
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    return handler.restore(directory, args=args)


def saved_expert_axes(leaves: dict[str, Any]) -> dict[str, int]:
  """Returns each array's expert axis, if any: the nesting of experts in its checksum."""

  def depth(node: Any) -> int:
    return 1 + depth(node[0]) if isinstance(node, list) else 0

  return {
    n: depth(leaf["experts"]) - 1 for n, leaf in leaves.items() if "experts" in leaf
  }


def _is_memory(error: Exception) -> bool:
  """Returns whether reading failed for lack of memory, not because of the files."""
  return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _is_refused(error: Exception) -> bool:
  return isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error)


def _not_permitted(path: RunPath) -> UserError:
  return UserError(f"This user may not read {path}. Change its permissions.")


def _one_line(error: BaseException, limit: int = 200) -> str:
  # Orbax wraps TensorStore's message in a less specific one.
  while error.__cause__ is not None:
    error = error.__cause__
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= limit else text[: limit - 3] + "..."
