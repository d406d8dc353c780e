"""A folder of safetensors: its tensors by name, read one at a time.

Headers are read and checked at once, data only on demand and through one open file at a
time. The file is closed after some hundred megabytes, since the pages of a mapped file
count as memory of this process.

Quantised tensors appear unpacked; see `moejax.interop.quantised`.
"""

import contextlib
import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from moejax import files
from moejax.errors import UserError
from moejax.interop import quantised

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES: dict[str, Any] = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
}
"""The dtypes that parameters may have, by their names in the format."""

_MAPPED_BYTES = 1 << 28
"""A file is closed after this many bytes have been read from it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
  """The entry of a tensor in a header."""

  file: Path
  dtype: str
  shape: tuple[int, ...]
  offset: int
  """Position of the first byte in the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """A tensor that can be read, and its parts on disk."""

  dtype: str
  shape: tuple[int, ...]
  parts: tuple[Stored, ...]
  packing: quantised.Packing | None = None
  names: tuple[str, ...] = ()
  """Names of the parts on disk."""


class Source:
  """The tensors of a folder."""

  def __init__(self, folder: Path | str, packing: quantised.Packing | None = None):
    """Reads the headers of all files.

    Args:
      folder: with model.safetensors, or several files and their index.
      packing: how some tensors are quantised; None if they are not.

    Raises:
      UserError: there are no weights, a file is missing, cut short or unreadable, or a
        tensor is in another file than in the index.
    """
    self.folder = Path(folder)
    self._open: tuple[Path, Any, contextlib.ExitStack] | None = None
    self._read_bytes = 0
    stored = self._headers()
    self.tensors = _unpacked(stored, packing)

  def read(self, name: str, index: int | None = None) -> Shaped[np.ndarray, "..."]:
    """Returns a tensor, or one row of its first axis, in its own dtype.

    Raises:
      UserError: it cannot be read, or has a non-finite value.
    """
    tensor = self.tensors[name]
    parts = [self._part(n, p, index) for n, p in zip(tensor.names, tensor.parts)]
    array = parts[0]
    if tensor.packing is not None:
      array = tensor.packing.unpack(*parts)
    if not np.isfinite(array.astype(np.float32, copy=False)).all():
      where = "" if index is None else f" at index {index}"
      raise UserError(
        f"{tensor.parts[0].file}: {name}{where} has numbers that are not finite (NaN or "
        "infinity). Get an intact copy of the file."
      )
    return array

  def close(self) -> None:
    """Closes the open file, if any."""
    if self._open is not None:
      self._open[2].close()
    self._open, self._read_bytes = None, 0

  def _part(
    self, name: str, stored: Stored, index: int | None
  ) -> Shaped[np.ndarray, "..."]:
    try:
      if stored.dtype in quantised.RAW:
        return _raw(stored, index)
      file = self._file(stored.file)
      if index is None:
        array = file.get_tensor(name)
      else:
        array = file.get_slice(name)[index : index + 1][0]
    except Exception as e:  # The library raises nothing narrower.
      raise UserError(f"{stored.file}: {name} cannot be read: {_one_line(e)}.") from e
    self._read_bytes += array.nbytes
    return array

  def _file(self, path: Path) -> Any:
    if self._open is None or self._open[0] != path or self._read_bytes > _MAPPED_BYTES:
      self.close()
      stack = contextlib.ExitStack()
      self._open = (path, stack.enter_context(_safe_open(path)), stack)
    return self._open[1]

  def _headers(self) -> dict[str, Stored]:
    placed = _placed(self.folder)
    stored: dict[str, Stored] = {}
    for path in sorted(set(placed.values())):
      for name, about in _header(path).items():
        if name in stored:
          raise UserError(
            f"{path}: {name} is in {stored[name].file.name} too. Remove one of them."
          )
        stored[name] = about
    for name, path in placed.items():
      if name and (name not in stored or stored[name].file != path):
        raise UserError(
          f"{self.folder / INDEX} says that {name} is in {path.name}, but it is not. Get "
          "both from the same model."
        )
    return stored


def has_weights(folder: Path) -> bool:
  """Returns whether a folder holds safetensors that `Source` would read."""
  return (folder / INDEX).exists() or (folder / SINGLE).exists()


def _placed(folder: Path) -> dict[str, Path]:
  """Returns the file of each tensor, from the index; under "" if there is one file."""
  if not (folder / INDEX).exists():
    if (folder / SINGLE).exists():
      return {"": folder / SINGLE}
    others = sorted(
      p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".gguf")
    )
    held = f"; it holds {', '.join(others[:3])}, which are not read" if others else ""
    raise UserError(
      f"--from_hf={folder} has no weights: neither {SINGLE} nor {INDEX}{held}. Give the "
      "folder of a model saved as safetensors."
    )
  path = folder / INDEX
  try:
    found = files.read_json(path)["weight_map"]
    placed = {name: folder / Path(file).name for name, file in found.items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f"{path} cannot be read as an index: {_one_line(e)}.") from e
  missing = sorted({file.name for file in placed.values() if not file.exists()})
  if missing:
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    raise UserError(
      f"{path} names {', '.join(missing[:3])}{more}, which the folder does not have. "
      "Copy the missing files there."
    )
  return placed


def _safe_open(path: Path) -> Any:
  try:
    from safetensors import safe_open
  except ImportError as e:
    raise UserError(
      "Published models are read with the safetensors library, which is not installed. "
      "Install moejax[hf]."
    ) from e
  return safe_open(path, framework="np")


def _header(path: Path) -> dict[str, Stored]:
  """Reads the header of a file; the library checks that the file's length is right."""
  try:
    with _safe_open(path):
      pass
    with files.open_regular(path) as file:
      (size,) = struct.unpack("<Q", file.read(8))
      header: Mapping[str, Any] = json.loads(file.read(size))
  except UserError:
    raise
  except Exception as e:  # The library raises nothing narrower.
    raise UserError(
      f"{path} is not a complete safetensors file: {_one_line(e)}. Copy it again."
    ) from e
  return {
    name: Stored(
      file=path,
      dtype=about["dtype"],
      shape=tuple(about["shape"]),
      offset=8 + size + about["data_offsets"][0],
    )
    for name, about in header.items()
    if name != "__metadata__"
  }


def _raw(stored: Stored, index: int | None) -> Shaped[np.ndarray, "..."]:
  """Reads a tensor of a dtype that the library does not convert to numpy."""
  dtype = quantised.RAW[stored.dtype]
  shape, offset = stored.shape, stored.offset
  if index is not None:
    shape = shape[1:]
    offset += index * int(np.prod(shape)) * dtype.itemsize
  count = int(np.prod(shape))
  with files.open_regular(stored.file) as file:
    file.seek(offset)
    data = file.read(count * dtype.itemsize)
  return np.frombuffer(data, dtype, count).reshape(shape)


def _unpacked(
  stored: dict[str, Stored], packing: quantised.Packing | None
) -> dict[str, Tensor]:
  """Returns the tensors, with each quantised tensor and its scales merged into one."""
  groups = {} if packing is None else packing.groups(stored)
  used = {name for names in groups.values() for name in names}
  tensors = {
    name: Tensor(dtype=s.dtype, shape=s.shape, parts=(s,), names=(name,))
    for name, s in stored.items()
    if name not in used
  }
  for name, names in groups.items():
    assert packing is not None
    parts = tuple(stored[n] for n in names)
    tensors[name] = Tensor(
      dtype="BF16",
      shape=packing.shape(*(p.shape for p in parts)),
      parts=parts,
      packing=packing,
      names=names,
    )
  return dict(sorted(tensors.items()))


def _one_line(error: BaseException, limit: int = 160) -> str:
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= limit else text[: limit - 3] + "..."
