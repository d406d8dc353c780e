"""Writes a checkpoint whose arrays are made one at a time, just before they are written.

For parameters that come from elsewhere and need not be in memory together: the largest of
them, and what the writer encodes of it, is all that the host holds. Such a checkpoint is
read like any other.
"""

import asyncio
import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Shaped

from moejax.checkpoint import fingerprint
from moejax.checkpoint.orbax import is_refusal, reason
from moejax.checkpoint.read import FORMAT, empty_dicts, pack_meta, quiet
from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import UserError
from moejax.run import provenance

_CHUNK_BYTES = 1 << 26
"""Bytes of an array that are encoded and stored together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyArray:
  """An array that `read` makes when it is needed."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], Shaped[np.ndarray, "..."]]

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize


class _Handler(ocp.type_handlers.NumpyHandler):
  """Reads and writes one array after the other, and sums each while it is there."""

  def __init__(self, axes: Mapping[str, int]):
    super().__init__(deepcopy_host_arrays=False)
    self._axes = axes
    self.leaves: dict[str, fingerprint.Checksum] = {}
    self.failure: Exception | None = None

  async def serialize(
    self, values: Sequence[Any], infos: Sequence[Any], args: Any = None
  ) -> list[Any]:
    args = args or [ocp.SaveArgs()] * len(values)
    for value, info, arg in zip(values, infos, args, strict=True):
      try:
        array = value.read()
      except Exception as e:
        self.failure = e  # Orbax would wrap it.
        raise
      host = fingerprint.snapshot({info.name: array}, self._axes)
      self.leaves |= fingerprint.checksums(host)
      for written in await super().serialize([array], [info], [arg]):
        await asyncio.to_thread(written.result)
      del array, host
    return []


def save(
  directory: Path,
  step: int,
  params: Mapping[str, Any],
  *,
  config: Config,
  metadata: Mapping[str, Any],
  logical_axes: Any,
) -> dict[str, fingerprint.Checksum]:
  """Writes one step; it gets its name when it is whole.

  Args:
    directory: of a run's checkpoints; made if missing. One process writes.
    step: names the checkpoint.
    params: nested dict of LazyArray.
    config: of the run, resolved.
    metadata: more to store with the step: JSON.
    logical_axes: of the parameters.

  Returns:
    The checksum of each array, by name.

  Raises:
    UserError: the disk is full or not writable; or what reading an array raises.
  """
  quiet()
  tree = {"params": params}
  handler = _Handler(fingerprint.expert_axes(tree, logical_axes))
  registry = ocp.type_handlers.create_type_handler_registry((LazyArray, handler))
  # As a save that was killed, which the next one in this directory removes.
  temporary = directory / f"{step}.orbax-checkpoint-tmp"
  try:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_state(temporary / "state", tree, registry)
    meta = {
      **metadata,
      "format": FORMAT,
      "step": step,
      "position": {},
      "config": config_text.to_dict(config),
      "versions": provenance.versions(),
      "revision": provenance.revision(),
      "empty": empty_dicts(params),
      "metric": None,
      "leaves": handler.leaves,
    }
    (temporary / "meta").mkdir()
    (temporary / "meta" / "metadata").write_text(pack_meta(meta), encoding="utf-8")
    temporary.rename(directory / str(step))
  except BaseException as e:
    shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(handler.failure, UserError):
      raise handler.failure from None
    if isinstance(e, Exception) and is_refusal(e):
      raise UserError(
        f"{directory}: the checkpoint could not be written ({reason(e)}). Make room, and "
        "give the same command again."
      ) from e
    raise
  return handler.leaves


def _write_state(directory: Path, tree: Any, registry: Any) -> None:
  import jax

  directory.mkdir()
  args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
  made = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
  with contextlib.closing(made) as handler:
    handler.save(directory, args=ocp.args.PyTreeSave(tree, save_args=args))
    handler.finalize(directory)
