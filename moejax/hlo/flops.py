"""FLOPs of one instruction of an optimised program, as executed.

Only products are counted, not elementwise work, as in `cost/flops`. A multiply-add is two
FLOPs. The compiler's own estimate counts a loop's body once and omits kernels, so FLOPs
are counted here, from shapes. XLA:TPU turns every product into a convolution, and batch
dimensions into windows that meet their operand once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import numpy as np

_ARRAY = re.compile(r"[a-z]+\d*(?:e\d+m\d+\w*)?\[([\d,]*)\]")

RAGGED = re.compile(r"ragged[-_]dot|gmm")
"""Names of kernels that process only the rows in use, whatever the buffer's length."""

_ATTENTION_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}
"""Products in each kernel of splash attention, over the width of a key and of a value.

fwd: scores | values. dq: scores, d query | d scores. dkv: scores, d key | d value,
d scores."""


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a program: `%name = shape opcode(rest`."""

  name: str
  shape: str
  opcode: str
  rest: str


def flops_of(
  instruction: Instruction, shapes: Mapping[str, str], ragged_fraction: float = 1.0
) -> float:
  """Returns the FLOPs of one execution; 0 if it is not a product.

  Args:
    instruction: of any opcode.
    shapes: of all instructions in its computation, by name.
    ragged_fraction: fraction of a ragged buffer's rows in use.
  """
  match instruction.opcode:
    case "dot":
      return _dot(instruction, shapes)
    case "convolution":
      return _convolution(instruction, shapes)
    case "custom-call":
      count = _kernel(instruction, shapes)
      return count * (ragged_fraction if RAGGED.search(instruction.name) else 1.0)
  return 0.0


def _dims(shape: str) -> list[int]:
  """Returns the dimensions of the first array of a shape."""
  found = _ARRAY.search(shape)
  return [int(d) for d in found[1].split(",") if d] if found else []


def _operands(instruction: Instruction, shapes: Mapping[str, str]) -> list[list[int]]:
  """Returns the dimensions of each operand."""
  depth, end = 1, len(instruction.rest)
  for index, character in enumerate(instruction.rest):
    depth += (character == "(") - (character == ")")
    if depth == 0:
      end = index
      break
  names = re.findall(r"%([\w.\-]+)", instruction.rest[:end])
  return [_dims(shapes.get(name, "")) for name in names]


def _numbers(text: str, pattern: str) -> list[int]:
  found = re.search(pattern, text)
  return [int(n) for n in found[1].split(",") if n] if found else []


def _dot(instruction: Instruction, shapes: Mapping[str, str]) -> float:
  left = _operands(instruction, shapes)[0]
  contracted = _numbers(instruction.rest, r"lhs_contracting_dims=\{([\d,]*)\}")
  return (
    2.0 * math.prod(_dims(instruction.shape)) * math.prod(left[i] for i in contracted)
  )


def _convolution(instruction: Instruction, shapes: Mapping[str, str]) -> float:
  left, right = _operands(instruction, shapes)[:2]
  result, rest = _dims(instruction.shape), instruction.rest
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
  assert labels is not None, instruction
  lhs, rhs, out = labels.groups()
  feature_groups = _numbers(rest, r"feature_group_count=(\d+)") or [1]
  batch_groups = _numbers(rest, r"batch_group_count=(\d+)") or [1]
  window = _window(rest)
  positions = 1
  for axis in (c for c in lhs if c.isdigit()):
    options = {name: values[int(axis)] for name, values in window.items()}
    positions *= _valid_positions(
      left[lhs.index(axis)],
      right[rhs.index(axis)],
      result[out.index(axis)],
      tuple(sorted(options.items())),
    )
  inputs = left[lhs.index("f")] // feature_groups[0]
  batch = left[lhs.index("b")] // batch_groups[0]
  return 2.0 * positions * inputs * batch * result[out.index("f")]


def _window(rest: str) -> dict[str, list[tuple[int, ...]]]:
  """Returns each spatial axis's stride, pad, lhs_dilate and rhs_dilate, where given."""
  found = re.search(r"window=\{([^}]*)\}", rest)
  result = {}
  for name, text in re.findall(r"(\w+)=([\dx_\-]+)", found[1] if found else ""):
    values = [tuple(int(n) for n in part.split("_")) for part in text.split("x")]
    result[name] = values
  return {k: v for k, v in result.items() if k not in ("size", "rhs_reversal")}


@functools.cache
def _valid_positions(
  size: int, window: int, result: int, options: tuple[tuple[str, tuple[int, ...]], ...]
) -> int:
  """Counts the pairs of (output, window element) that meet an element of the input."""
  given = dict(options)
  stride, low = given.get("stride", (1,))[0], given.get("pad", (0, 0))[0]
  dilated, spread = given.get("lhs_dilate", (1,))[0], given.get("rhs_dilate", (1,))[0]
  out = np.arange(result, dtype=np.int64)[:, None] * stride - low
  index = out + np.arange(window, dtype=np.int64)[None, :] * spread
  inside = (index >= 0) & (index <= (size - 1) * dilated) & (index % dilated == 0)
  return int(np.sum(inside))


def _kernel(instruction: Instruction, shapes: Mapping[str, str]) -> float:
  """Returns a kernel's FLOPs, from its own estimate, its name or its operands."""
  rest = instruction.rest
  stated = re.search(r'cost_estimate":\{"flops":"?(\d+)', rest)
  if stated:
    return float(stated[1])
  splash = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.name)
  if splash:
    return _splash(rest, splash[1])
  if "__cudnn$fmha" in rest:
    # cuDNN gets the mask as a bias, so it skips no block. The backward pass recomputes
    # scores, and computes the gradients of values, scores, queries and keys.
    size = _layouts(rest)[0]
    return 2.0 * (5 if "Backward" in rest else 2) * math.prod(size) * size[1]
  if "gemm" in rest.partition("custom_call_target=")[2][:40]:
    return _gemm(instruction, shapes)
  return 0.0


def _splash(rest: str, part: str) -> float:
  """Returns the FLOPs of the blocks on and below the diagonal, ignoring any window."""
  query, _, value = _layouts(rest, r"\b(?:bf16|f16|f32)")[:3]
  *batch, length, size = query
  suffix = "" if part == "fwd" else f"_{part}"
  block = _numbers(rest, rf'block_q{suffix}\\?": (\d+)') or [length]
  blocks = length // block[0]
  visited = (blocks + 1) / (2 * blocks)
  over_key, over_value = _ATTENTION_PRODUCTS[part]
  widths = over_key * size + over_value * value[-1]
  return 2.0 * widths * math.prod(batch) * length * length * visited


def _layouts(rest: str, dtype: str = r"[a-z]+\d*(?:e\d+m\d+\w*)?") -> list[list[int]]:
  """Returns the dimensions of a kernel's operands whose type matches."""
  text = rest.partition("operand_layout_constraints={")[2]
  found = re.findall(rf"{dtype}\[([\d,]*)\]", text)
  return [[int(n) for n in dims.split(",") if n] for dims in found]


def _gemm(instruction: Instruction, shapes: Mapping[str, str]) -> float:
  """Returns the FLOPs of a GPU library's product, from the dimensions in its config."""
  left = _operands(instruction, shapes)[0]
  found = re.search(
    r'lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest.replace("\\", "")
  )
  contracted = [int(n) for n in re.findall(r"\d+", found[1])] if found else [-1]
  return (
    2.0 * math.prod(_dims(instruction.shape)) * math.prod(left[i] for i in contracted)
  )
