"""Quantised weights on disk, and the values that they represent.

Fp8    DeepSeek-V3: X in 8 bits (e4m3) and X_scale_inv, one factor for each block of 128 x
       128 (arXiv:2412.19437, section 3.3): w = x * scale.
Mxfp4  GPT-OSS: X_blocks, two 4-bit numbers (e2m1) in a byte, the low half first, and
       X_scales, a power of two for 32 numbers: the exponent plus 127 (OCP Microscaling
       Formats, version 1.0, section 5).

Both give bfloat16, the dtype in which these models compute.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from moejax.errors import UserError

RAW: dict[str, np.dtype] = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
"""Dtypes whose bytes are read without the safetensors library."""

_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4_VALUES = np.concatenate([_FP4, -_FP4])
_MX_ROW = 32
_BF16 = ml_dtypes.bfloat16


class Packing(abc.ABC):
  """A format in which several tensors on disk represent one."""

  @abc.abstractmethod
  def groups(self, stored: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Returns the parts on disk of each tensor that is packed.

    Args:
      stored: tensors on disk, with `file`, `dtype` and `shape`.

    Raises:
      UserError: a part is missing or has a wrong shape.
    """

  @abc.abstractmethod
  def shape(self, *parts: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the tensor, from those of its parts."""

  @abc.abstractmethod
  def unpack(self, *parts: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Returns the tensor; or one row of it, from one row of each part."""


@dataclasses.dataclass(frozen=True)
class Fp8(Packing):
  """8-bit floats with one factor per block."""

  block: tuple[int, int] = (128, 128)

  def groups(self, stored: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, about in stored.items():
      if about.dtype != "F8_E4M3":
        continue
      scale = f"{name}_scale_inv"
      if scale not in stored:
        raise UserError(
          f"{about.file}: {name} is in 8 bits and has no {scale}. Copy the files again."
        )
      blocks = tuple(-(-size // b) for size, b in zip(about.shape, self.block))
      if len(about.shape) != 2 or stored[scale].shape != blocks:
        raise UserError(
          f"{about.file}: {scale} is {list(stored[scale].shape)}, but {name} of "
          f"{list(about.shape)} needs {list(blocks)} blocks of {list(self.block)}."
        )
      found[name] = (name, scale)
    return found

  def shape(self, *parts: tuple[int, ...]) -> tuple[int, ...]:
    return parts[0]

  def unpack(self, *parts: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    weight, scale = parts
    rows, columns = weight.shape
    whole = np.repeat(scale.astype(np.float32), self.block[0], 0)[:rows]
    whole = np.repeat(whole, self.block[1], 1)[:, :columns]
    return (weight.astype(np.float32) * whole).astype(_BF16)


@dataclasses.dataclass(frozen=True)
class Mxfp4(Packing):
  """4-bit floats with a power of two per 32; the tensor's last two axes are swapped."""

  def groups(self, stored: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, about in stored.items():
      if not name.endswith("_blocks"):
        continue
      base = name.removesuffix("_blocks")
      scales = f"{base}_scales"
      if scales not in stored:
        raise UserError(f"{about.file}: {name} has no {scales}. Copy the files again.")
      shape, dtype = about.shape, about.dtype
      fits = len(shape) == 4 and shape[-1] == _MX_ROW // 2
      if not fits or dtype != "U8" or stored[scales].shape != shape[:-1]:
        raise UserError(
          f"{about.file}: {name} ({dtype} {list(shape)}) and {scales} "
          f"({list(stored[scales].shape)}) are not blocks of {_MX_ROW} 4-bit numbers."
        )
      found[base] = (name, scales)
    return found

  def shape(self, *parts: tuple[int, ...]) -> tuple[int, ...]:
    experts, outputs, blocks, _ = parts[0]
    return (experts, blocks * _MX_ROW, outputs)

  def unpack(self, *parts: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    blocks, scales = parts
    values = np.empty((*blocks.shape[:-1], _MX_ROW), np.float32)
    values[..., 0::2] = _FP4_VALUES[blocks & 15]
    values[..., 1::2] = _FP4_VALUES[blocks >> 4]
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    joined = values.reshape(*values.shape[:-2], -1)
    return np.swapaxes(joined, -1, -2).astype(_BF16)


def packing(config: Mapping[str, Any], path: str) -> Packing | None:
  """Returns how a model's weights are quantised by its config.json; None if they are not.

  Raises:
    UserError: the format is not supported.
  """
  given = config.get("quantization_config")
  if given is None:
    return None
  method = given.get("quant_method") if isinstance(given, dict) else given
  if method == "mxfp4":
    return Mxfp4()
  if method == "fp8":
    block = given.get("weight_block_size")
    if given.get("fmt", "e4m3") == "e4m3" and block is not None and _is_block(block):
      return Fp8((block[0], block[1]))
  raise UserError(
    f"{path}: quantization_config={given} is not supported; fp8 (e4m3, with "
    "weight_block_size) and mxfp4 are. Dequantise the model first."
  )


def _is_block(value: Any) -> bool:
  is_pair = isinstance(value, list) and len(value) == 2
  return is_pair and all(type(size) is int and size > 0 for size in value)
