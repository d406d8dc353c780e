"""The parts of arrays that one process holds, each in its own file.

No process sees all of an emergency checkpoint. Each process stores the bits of the
distinct parts on its devices, one file each, with the place of the part in the whole
array and a checksum. What a device needs is assembled from the parts that overlap it, so
they can also be restored onto another mesh, as long as they are on this machine.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.checkpoint import fingerprint
from moejax.checkpoint.read import DamagedCheckpointError
from moejax.storage.full import save_array

Index = list[list[int]]
"""Start and stop along each axis of an array's bits; see `fingerprint.raw`."""

Part = tuple[Index, np.ndarray]

Entry = dict[str, Any]
"""JSON: file, index and checksum of a stored part."""


def held(leaf: jax.Array) -> list[Part]:
  """Returns the distinct parts of an array on this process's devices, on the host."""
  bits = fingerprint.raw(leaf)
  found = {}
  for shard in bits.addressable_shards:
    index = _bounds(shard.index, bits.shape)
    if str(index) not in found:
      data = np.asarray(shard.data)
      # numpy's files do not support bfloat16.
      found[str(index)] = (index, data.view(np.dtype(f"u{data.dtype.itemsize}")))
  return list(found.values())


def store(directory: Path, parts: Sequence[Part], first: int) -> list[Entry]:
  """Writes parts durably, from `first`.npy on, and returns their entries."""
  entries = []
  for number, (index, bits) in enumerate(parts, first):
    file = f"{number}.npy"
    write_file(directory / file, lambda f, bits=bits: save_array(f, bits))
    entries.append({"file": file, "index": index, "sum": _sum(index, bits)})
  return entries


def write_file(path: Path, write: Callable[[Any], Any]) -> None:
  """Writes a file durably, so that it survives a loss of power."""
  with path.open("wb") as file:
    write(file)
    file.flush()
    os.fsync(file.fileno())


def read(name: str, leaf: Any, stored: Sequence[tuple[Path, Entry]]) -> list[np.ndarray]:
  """Reads the part of an array for each of this process's devices.

  Args:
    name: of the array, for errors.
    leaf: its shape, dtype and sharding.
    stored: the parts on this machine, each with the directory of its file. Parts with
      different indices do not overlap.

  Returns:
    Bits, in the order of the sharding's devices in this process.

  Raises:
    DamagedCheckpointError: a part is missing here, or not as written.
  """
  shape = _bits_shape(leaf)
  beyond = (slice(None),) * (len(shape) - len(leaf.shape))
  loaded: dict[str, np.ndarray] = {}

  def load(path: Path, entry: Entry) -> np.ndarray:
    key = str(entry["index"])
    if key not in loaded:
      loaded[key] = _load(name, path, entry)
    return loaded[key]

  made: dict[str, np.ndarray] = {}
  out = []
  for place in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
    index = _bounds((*place, *beyond), shape)
    if str(index) not in made:
      made[str(index)] = _region(name, index, stored, load)
    out.append(made[str(index)])
  return out


def placed(leaf: Any, bits: Sequence[np.ndarray]) -> jax.Array:
  """Puts what `read` returned onto the devices, as an array like `leaf`."""
  is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  dtype = np.dtype(np.uint32) if is_key else np.dtype(leaf.dtype)
  devices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
  shards = [
    # The next step donates the array: it must not be numpy's memory.
    jax.device_put(part.view(dtype), device, may_alias=False)
    for device, part in zip(devices, bits, strict=True)
  ]
  whole = jax.make_array_from_single_device_arrays(
    _bits_shape(leaf), leaf.sharding, shards
  )
  if not is_key:
    return whole
  return jax.jit(jax.random.wrap_key_data, out_shardings=leaf.sharding)(whole)


def _region(
  name: str,
  index: Index,
  stored: Sequence[tuple[Path, Entry]],
  load: Callable[[Path, Entry], np.ndarray],
) -> np.ndarray:
  """Returns the bits at an index, from the parts that overlap it."""
  for path, entry in stored:
    if entry["index"] == index:
      return load(path, entry)
  out, covered, seen = None, 0, []
  for path, entry in stored:
    overlap = [
      [max(a, c), min(b, d)] for (a, b), (c, d) in zip(index, entry["index"], strict=True)
    ]
    if entry["index"] in seen or any(start >= stop for start, stop in overlap):
      continue
    seen.append(entry["index"])
    part = load(path, entry)
    if out is None:
      out = np.empty([stop - start for start, stop in index], part.dtype)
    into, of = (_inside(overlap, outer) for outer in (index, entry["index"]))
    out[into] = part[of]
    covered += int(np.prod([stop - start for start, stop in overlap]))
  if out is None or covered != out.size:
    raise DamagedCheckpointError(f"a part of {name} is not on this machine")
  return out


def _inside(index: Index, outer: Index) -> tuple[slice, ...]:
  """Returns an index relative to one that contains it."""
  return tuple(
    slice(start - first, stop - first)
    for (start, stop), (first, _) in zip(index, outer, strict=True)
  )


def _load(name: str, path: Path, entry: Entry) -> np.ndarray:
  try:
    bits = np.load(path / Path(entry["file"]).name, allow_pickle=False)
    if list(bits.shape) != [stop - start for start, stop in entry["index"]]:
      raise ValueError("it has the wrong shape")
    if _sum(entry["index"], bits) != entry["sum"]:
      raise ValueError("it has changed since it was written")
  except (OSError, ValueError, EOFError) as error:
    raise DamagedCheckpointError(f"{name}, {entry['file']}: {error}") from error
  return bits


def _sum(index: Index, bits: np.ndarray) -> str:
  slices = tuple(slice(start, stop) for start, stop in index)
  shape = tuple(stop for _, stop in index)
  return fingerprint.part_checksum(shape, slices, bits, None)["sum"]


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
  return [list(s.indices(size)[:2]) for s, size in zip(index, shape, strict=True)]


def _bits_shape(leaf: Any) -> tuple[int, ...]:
  if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return tuple(leaf.shape)
  return tuple(jax.eval_shape(jax.random.key_data, leaf).shape)
