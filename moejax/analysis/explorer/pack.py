"""Columns of numbers as text that can be embedded in a page and read by a browser.

  base64( zlib( uint32 length of the header | header | columns ) )

The header is JSON: for each column its name, type, shape, place and whether it holds
differences. All numbers are little-endian. For types of several bytes, all first bytes
come first, then all second ones, and so on: high bytes are mostly zero and compress well.
`explorer/data.js` reads this format with the browser's own DecompressionStream.
"""

import base64
import json
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

Columns = dict[str, Shaped[np.ndarray, "..."]]


def pack(columns: Mapping[str, np.ndarray], differences: Collection[str] = ()) -> str:
  """Returns columns as text.

  Args:
    columns: uint8, uint16, uint32 or float32, of any shape.
    differences: names of columns in which each row except the first is stored as its
      difference to the one before, in the arithmetic of its type.
  """
  header, parts, place = [], [], 0
  for name, values in columns.items():
    stored = _differences(values) if name in differences else values
    octets = stored.astype(stored.dtype.newbyteorder("<"), copy=False).reshape(-1)
    planes = octets.view(np.uint8).reshape(-1, values.dtype.itemsize).T.tobytes()
    about = {"name": name, "type": values.dtype.name, "shape": list(values.shape)}
    header.append(about | {"at": place, "differences": name in differences})
    parts.append(planes)
    place += len(planes)
  return deflate(_prefixed(json.dumps(header).encode()) + b"".join(parts))


def unpack(text: str) -> Columns:
  """Returns the columns of `pack`."""
  data = inflate(text)
  length = int.from_bytes(data[:4], "little")
  body, columns = data[4 + length :], {}
  for about in json.loads(data[4 : 4 + length]):
    dtype = np.dtype(about["type"]).newbyteorder("<")
    count = int(np.prod(about["shape"]))
    planes = np.frombuffer(body, np.uint8, count * dtype.itemsize, about["at"])
    octets = np.ascontiguousarray(planes.reshape(dtype.itemsize, count).T)
    values = octets.view(dtype).reshape(about["shape"])
    if about["differences"]:
      values = np.add.accumulate(values, axis=0, dtype=values.dtype)
    columns[about["name"]] = values
  return columns


def pack_json(value: Any) -> str:
  """Returns any JSON as text without markup; `inflate` restores it."""
  text = json.dumps(value, separators=(",", ":"), allow_nan=False)
  return deflate(text.encode())


def deflate(data: bytes) -> str:
  return base64.b64encode(zlib.compress(data, 9)).decode()


def inflate(text: str) -> bytes:
  return zlib.decompress(base64.b64decode(text))


def ids(values: Int[np.ndarray, "..."], largest: int) -> Shaped[np.ndarray, "..."]:
  """Returns numbers in the smallest type that holds `largest`."""
  for dtype in (np.uint8, np.uint16):
    if largest <= np.iinfo(dtype).max:
      return values.astype(dtype)
  return values.astype(np.uint32)


def quantized(
  values: Float[np.ndarray, "..."],
) -> tuple[UInt8[np.ndarray, "..."], float]:
  """Returns codes q and a scale, so that values are about scale * (q / 255)^2.

  Weights are mostly small: the square keeps their relative error small too. The error is
  at most scale * (q + 1/4) / 255^2. NaN becomes 0.

  Args:
    values: not negative.
  """
  values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
  scale = float(values.max(initial=0.0)) or 1.0
  codes = np.rint(255 * np.sqrt(np.maximum(values, 0.0) / scale))
  return codes.astype(np.uint8), scale


def restored(codes: UInt8[np.ndarray, "..."], scale: float) -> np.ndarray:
  """Returns the values of `quantized`."""
  return scale * (codes.astype(np.float64) / 255) ** 2


def rounded(values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
  """Returns float32 with eight bits of mantissa, which compresses to half the size."""
  bits = np.nan_to_num(values).astype(np.float32).view(np.uint32)
  return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _differences(values: np.ndarray) -> np.ndarray:
  return np.concatenate([values[:1], values[1:] - values[:-1]])


def _prefixed(header: bytes) -> bytes:
  return len(header).to_bytes(4, "little") + header
