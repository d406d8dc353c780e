"""Writes a checkpoint whose arrays are made part by part, just before they are written.

For parameters that come from elsewhere and need not be in memory together. The host holds
one part of one array and its encoded form. Such a checkpoint is read like any other.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
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


@dataclasses.dataclass(kw_only=True)
class LazyArray:
  """An array that `read` makes when it is needed, part by part.

  Attributes:
    shape: of the array.
    dtype: of the array.
    read: returns the part at an index, a slice for each axis.
    stacked: leading axes along which parts are read independently.
    expert_axis: the axis of experts, for the checksum.
    checksum: of the parts read so far.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[tuple[slice, ...]], Shaped[np.ndarray, "..."]]
  stacked: int = 0
  expert_axis: int | None = None
  checksum: fingerprint.Checksum | None = None

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize

  def part(self, index: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
    """Reads a part, once, and adds it to the checksum."""
    part = np.asarray(self.read(index))
    own = fingerprint.part_checksum(self.shape, index, part, self.expert_axis)
    self.checksum = (
      own if self.checksum is None else fingerprint.added(self.checksum, own)
    )
    return part

  def parts(self, least: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yields the indices of parts that cover the array.

    Args:
      least: minimum size of a part along each axis, except at the end.
    """
    ends = []
    for axis, size in enumerate(self.shape):
      step = least[axis] if axis < self.stacked else max(size, 1)
      ends.append([slice(i, min(i + step, size)) for i in range(0, size, step)])
    yield from itertools.product(*ends)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    del dtype, copy
    return self.part(tuple(slice(0, size) for size in self.shape))


class _Handler(ocp.type_handlers.NumpyHandler):
  """Reads and writes one part of one array at a time."""

  def __init__(self):
    super().__init__(deepcopy_host_arrays=False)
    self._turn = asyncio.Lock()
    self.failure: Exception | None = None

  async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any) -> None:
    # Orbax writes all arrays at the same time, and each as a whole. If it ever stopped
    # calling this, it would write `np.asarray(value)`: correct, but with more memory.
    async with self._turn:
      store = await tensorstore.open(
        tensorstore.Spec(tspec), create=True, open=True, context=ts_context
      )
      for index in value.parts(store.chunk_layout.write_chunk.shape or ()):
        try:
          part = value.part(index)
        except Exception as e:
          self.failure = e  # Orbax would wrap it.
          raise
        await store[index].write(part)


def save(
  directory: Path,
  step: int,
  params: Mapping[str, Any],
  *,
  config: Config,
  metadata: Mapping[str, Any],
  logical_axes: Any,
  others: Mapping[str, Any] | None = None,
  position: Mapping[str, Any] | None = None,
  describe: Callable[[dict[str, fingerprint.Checksum]], dict[str, Any]] | None = None,
) -> dict[str, fingerprint.Checksum]:
  """Writes one step, which gets its final name when it is complete.

  Args:
    directory: of a run's checkpoints; created if missing. Only one process may write.
    step: names the checkpoint.
    params: nested dict of LazyArray.
    config: of the run, resolved.
    metadata: more to store with the step: JSON.
    logical_axes: of the parameters.
    others: the rest of the train state by name, as LazyArray and jax arrays; without it,
      the step holds parameters only.
    position: position of the data after this step, for a run that continues.
    describe: (checksum of each array) -> more metadata, called when all arrays are
      written.

  Returns:
    The checksum of each array, by name.

  Raises:
    UserError: the disk is full or not writable, or reading an array raises it.
  """
  quiet()
  tree = {"params": params, **(others or {})}
  arrays = fingerprint.named_leaves(tree)
  ready = {n: leaf for n, leaf in arrays.items() if not isinstance(leaf, LazyArray)}
  for name, axis in fingerprint.expert_axes(tree, logical_axes).items():
    if name not in ready:
      arrays[name].expert_axis = axis
  handler = _Handler()
  types: list[Any] = [(LazyArray, handler)]
  if ready:
    # Orbax's own handler, which also stores the kind of a random key.
    types.append((jax.Array, ocp.type_handlers.get_type_handler(jax.Array)))
  registry = ocp.type_handlers.create_type_handler_registry(*types)
  # Named like a killed save, which the next save in this directory removes.
  directory = directory.absolute()  # Orbax takes no other.
  temporary = directory / f"{step}.orbax-checkpoint-tmp"
  try:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_state(temporary / "state", tree, registry)
    leaves = fingerprint.checksums(fingerprint.snapshot(ready))
    leaves |= {n: array.checksum for n, array in arrays.items() if n not in ready}
    meta = {
      **metadata,
      **(describe(leaves) if describe is not None else {}),
      "format": FORMAT,
      "step": step,
      "position": dict(position or {}),
      "config": config_text.to_dict(config),
      "versions": provenance.versions(),
      "revision": provenance.revision(),
      "empty": empty_dicts(params),
      "metric": None,
      "leaves": leaves,
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
  return meta["leaves"]


def _write_state(directory: Path, tree: Any, registry: Any) -> None:
  directory.mkdir()
  target = epath.Path(directory)

  def how(array: Any) -> ocp.SaveArgs:
    if not isinstance(array, LazyArray) or array.nbytes <= _CHUNK_BYTES:
      return ocp.SaveArgs()
    return ocp.SaveArgs(
      chunk_byte_size=_CHUNK_BYTES, shard_axes=tuple(range(array.stacked))
    )

  args = ocp.args.PyTreeSave(
    tree,
    save_args=jax.tree.map(how, tree),
    # The writer keeps a file in memory until it is full.
    ocdbt_target_data_file_size=_CHUNK_BYTES,
  )
  made = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
  with contextlib.closing(made) as handler:
    handler.save(target, args=args)
    handler.finalize(target)
