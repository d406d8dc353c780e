"""A checkpoint's arrays, read part by part, without the model or its devices.

For programs that make new arrays from old ones and must not hold a whole model in memory.
An array of stacked layers is read one layer at a time, for any mesh and processes that
wrote it.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from jaxtyping import Shaped

from moejax import files
from moejax.checkpoint import fingerprint
from moejax.checkpoint.lazy import LazyArray
from moejax.checkpoint.read import (
  DamagedCheckpointError,
  read_meta,
  saved_expert_axes,
)

_PART_BYTES = 1 << 26
"""Bytes of an array that are verified together, unless one index of its first axis has
more."""


class Slices:
  """The arrays of one step, by dotted name, read only on request."""

  def __init__(self, step_directory: Path):
    """Reads the meta of a step.

    Raises:
      DamagedCheckpointError: it is not as written.
      UserError: it was written by a newer version, or reading it is not permitted.
    """
    self.directory = step_directory
    self._directory = step_directory / "state"
    self.meta: dict[str, Any] = read_meta(step_directory)
    self.leaves: dict[str, Any] = self.meta["leaves"]

  def names(self, prefix: str = "") -> list[str]:
    """Returns the names that begin with a prefix, such as `params.`."""
    return [name for name in self.leaves if name.startswith(prefix)]

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self.leaves[name]["shape"])

  def dtype(self, name: str) -> np.dtype:
    return np.dtype(self.leaves[name]["dtype"])

  def read(self, name: str, index: tuple[Any, ...] = ()) -> Shaped[np.ndarray, "..."]:
    """Returns a part of an array.

    Args:
      name: of the array.
      index: an integer or slice for each leading axis; the others are read whole.

    Raises:
      DamagedCheckpointError: it cannot be read.
    """
    try:
      store = self._open(name)
      if (tuple(store.shape), store.dtype.numpy_dtype) != (
        self.shape(name),
        self.dtype(name),
      ):
        raise ValueError(f"it has shape {list(store.shape)} and {store.dtype}")
      # Copied, so that no caller writes into the reader's cache.
      return np.array(store[(*index, ...)].read().result())
    except (OSError, ValueError, KeyError, TypeError) as e:
      words = " ".join(str(e).split())[:200]
      raise DamagedCheckpointError(f"{name} cannot be read: {words}") from e

  def _open(self, name: str) -> tensorstore.TensorStore:
    spec = {
      "driver": self._driver,
      "kvstore": {
        "driver": "ocdbt",
        "base": f"file://{self._directory.resolve()}/",
        "path": name,
      },
    }
    return tensorstore.open(tensorstore.Spec(spec), open=True).result()

  @functools.cached_property
  def _driver(self) -> str:
    stored = files.read_json(self._directory / "_METADATA")
    return "zarr3" if stored.get("use_zarr3") else "zarr"

  def verify(self, prefix: str, progress: Callable[[], None] | None = None) -> None:
    """Compares arrays with their checksums, part by part.

    Args:
      prefix: of the arrays that are read.
      progress: called after each array.

    Raises:
      DamagedCheckpointError: an array is missing or not as it was written.
    """
    axes = saved_expert_axes(self.leaves)
    found = {}
    for name in self.names(prefix):
      if self.leaves[name]["dtype"].startswith("key<"):
        continue
      array = LazyArray(
        shape=self.shape(name),
        dtype=self.dtype(name),
        read=functools.partial(self.read, name),
        stacked=1,
        expert_axis=axes.get(name),
      )
      for index in array.parts(self._least(array)):
        array.part(index)
      found[name] = array.checksum
      if progress is not None:
        progress()
    if changed := fingerprint.differences(self.leaves, found):
      more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
      raise DamagedCheckpointError(f"{'; '.join(changed[:3])}{more}")

  def _least(self, array: LazyArray) -> tuple[int, ...]:
    if not array.ndim:
      return ()
    one = max(array.nbytes // max(array.shape[0], 1), 1)
    return (max(_PART_BYTES // one, 1), *array.shape[1:])
