"""Reads the collectives, and the FLOPs, out of an optimised program.

Counts executions: an instruction in a loop counts once per iteration, and of a
conditional's branches, only the one with most instructions counts. Bytes are per device.
`bytes` is the buffer (operand of an all-to-all, result of an all-gather, operand of a
reduce-scatter or all-reduce). `wire_bytes` is what a device in a group of n must send:
(n-1)/n of the buffer, twice that for an all-reduce, all of it for a permute.

Parses text, since jax has no public interface to compiled instructions. Notations
handled: start/done pairs, tuples of buffers, replica groups as lists, as iota tiles and
as mesh axes, reduce-scatters that XLA:TPU fuses around an all-reduce.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from moejax.hlo.flops import Instruction, flops_of
from moejax.hlo.groups import axis_groups, axis_of, group_size

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
)

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
  r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_LAYOUT = re.compile(r"\{[^}]*\}")
_ON_HOST = re.compile(r"[a-z]\w*\[[\d,]*\]\{[^}]*S\(5\)[^}]*\}")
"""An array in the host's memory: XLA's memory space 5."""
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """All executions of one instruction, on one device."""

  kind: str
  axis: str
  """Mesh axes that its groups span, joined by commas; `?` if they match no axes."""
  count: int
  """How often it runs in a step."""
  bytes: int
  """Bytes of its buffer, per execution."""
  wire_bytes: int
  """Bytes that the device sends, per execution."""
  source: str
  """file:line that it comes from, in moejax if known; empty if the compiler drops it."""
  operation: str
  """The jax operation that it comes from."""
  across: bool = False
  """Whether it crosses the slow network between TPU slices."""


class Program:
  """A compiled program's computations, from `compiled.as_text()`."""

  def __init__(self, text: str):
    self._computations: dict[str, list[Instruction]] = {}
    self._entry = ""
    self._tables = _tables(text)
    current: list[Instruction] | None = None
    for line in _joined(text):
      header = _HEADER.match(line)
      if header:
        current = self._computations.setdefault(header[2], [])
        if header[1]:
          self._entry = header[2]
      elif line.startswith("}"):
        current = None
      elif current is not None and (found := _parse(line.strip())):
        current.append(found)

  def collectives(
    self, axes: Sequence[str], sizes: Sequence[int], across: str = ""
  ) -> list[Collective]:
    """Returns every collective between devices, in the order of execution.

    Args:
      axes: names of the mesh's axes, outermost first.
      sizes: devices along each within one slice: all slices run the same program.
      across: the axis that crosses slices.
    """
    groups = axis_groups(axes, sizes)
    result = []
    for instruction, count, where in self._executed(self._entry, 1, self._entry):
      if instruction.opcode == "send" and "megascale" in instruction.rest:
        result.append(_across_slices(instruction, count, across))
        continue
      kind = instruction.opcode.removesuffix("-start")
      if kind not in KINDS:
        continue
      if kind == "all-reduce" and "all-reduce-scatter" in where:
        kind = "reduce-scatter"
      axis, size = axis_of(instruction.rest, groups, math.prod(sizes))
      if size == 1:
        continue
      number = self._buffer_bytes(instruction, kind, where)
      factor = {"all-reduce": 2 * (size - 1) / size, "collective-permute": 1.0}
      result.append(
        Collective(
          kind=kind,
          axis=axis,
          count=count,
          bytes=number,
          wire_bytes=round(number * factor.get(kind, (size - 1) / size)),
          source=self._source(instruction.rest),
          operation=_attribute(instruction.rest, r'op_name="([^"]*)"'),
        )
      )
    return result

  @property
  def computations(self) -> Mapping[str, Sequence[Instruction]]:
    """The instructions of each computation, by name."""
    return self._computations

  def flops(self, ragged_fraction: float = 1.0) -> float:
    """Returns the FLOPs of all products that run on one device; see `hlo.flops`.

    Args:
      ragged_fraction: fraction of a ragged buffer's rows in use.
    """
    tables = {
      name: {i.name: i.shape for i in instructions}
      for name, instructions in self._computations.items()
    }
    return sum(
      count * flops_of(instruction, tables[where], ragged_fraction)
      for instruction, count, where in self._executed(self._entry, 1, self._entry)
    )

  def stacked_bytes(self, parameters: set[tuple[int, ...]]) -> int:
    """Returns the bytes that the loop over layers stacks for its backward pass, except
    those in the host's memory.

    Args:
      parameters: shapes of parameters, which are also stacks but do not count.
    """
    best = 0
    for instruction in self._computations.get(self._entry, ()):
      if instruction.opcode != "while":
        continue
      trips, total = self._trips(instruction, self._entry), 0.0
      shape = _ON_HOST.sub("", instruction.shape)
      for text, size in zip(
        _ARRAY.findall(_LAYOUT.sub("", shape)), _array_bytes(shape), strict=True
      ):
        dims = tuple(int(d) for d in text[1].split(",") if d)
        # The TPU compiler peels one iteration off a loop that offloads.
        is_stack = len(dims) > 2 and trips > 1 and dims[0] in (trips, trips + 1)
        if is_stack and dims not in parameters:
          total += size
      best = max(best, round(total))
    return best

  def _executed(
    self, name: str, count: int, inside: str
  ) -> Iterator[tuple[Instruction, int, str]]:
    for instruction in self._computations.get(name, ()):
      yield instruction, count, inside
      times = self._trips(instruction, name) if instruction.opcode == "while" else 1
      calls = called(instruction.rest)
      if (
        instruction.opcode == "conditional" and calls
      ):  # One branch runs: take the longest.
        calls = [max(calls, key=lambda call: len(self._computations.get(call[1], ())))]
      for role, name_of in calls:
        if role == "to_apply" and instruction.opcode != "call":
          continue  # The scalar function of a reduction.
        yield from self._executed(name_of, count * times, name_of)

  def _trips(self, loop: Instruction, where: str) -> int:
    """Returns a loop's number of iterations; 1 if unknown at compile time."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.rest)
    if known:
      return int(known[1])
    condition = dict(called(loop.rest)).get("condition", "")
    inside = self._computations.get(condition, ())
    bounds = [n for i in inside if (n := _constant(i)) is not None]
    if len(bounds) != 1:
      return 1
    places = [re.search(r"index=(\d+)", i.rest) for i in inside]
    first = [self._start(loop, int(place[1]), where) for place in places if place]
    return bounds[0] - (first[0] if first else 0)

  def _start(self, loop: Instruction, index: int, where: str) -> int:
    """Returns a loop counter's start: 0, or 1 if the first iteration was peeled off."""
    named = {i.name: i for i in self._computations[where]}
    at = named.get(_first_name(loop.rest))
    if at is not None and at.opcode == "tuple":
      names = re.findall(r"%([\w.\-]+)", at.rest.partition(")")[0])
      at = named.get(names[index]) if index < len(names) else None
    while at is not None and at.opcode.startswith(("copy", "bitcast")):
      at = named.get(_first_name(at.rest))
    return (_constant(at) or 0) if at is not None else 0

  def _buffer_bytes(self, instruction: Instruction, kind: str, where: str) -> int:
    arrays = _array_bytes(instruction.shape)
    if kind == "ragged-all-to-all":
      # One of the two buffers has spare room; the smaller one is what is sent.
      return round(min(arrays[-1], self._operand_bytes(instruction, where)))
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
      # (operands, results, contexts): largest is a gather's result, else the operand.
      # Several buffers sent as one are a tuple each; an all-reduce has only results.
      return round(max(sum(_array_bytes(part)) for part in _elements(instruction.shape)))
    if instruction.opcode == "reduce-scatter":
      return round(sum(arrays) * (group_size(instruction.rest) or 1))
    return round(sum(arrays))

  def _operand_bytes(self, instruction: Instruction, where: str) -> float:
    """Returns the bytes of the first operand."""
    name = _first_name(instruction.rest)
    return sum(
      sum(_array_bytes(i.shape)) for i in self._computations[where] if i.name == name
    )

  def _source(self, rest: str) -> str:
    direct = re.search(r'source_file="([^"]*)" source_line=(\d+)', rest)
    if direct:
      return f"{_short(direct[1])}:{direct[2]}"
    frame = re.search(r"stack_frame_id=(\d+)", rest)
    return self._tables.source(int(frame[1])) if frame else ""


def _across_slices(send: Instruction, count: int, axis: str) -> Collective:
  """Returns a transfer between slices, which the runtime carries out."""
  kind = _attribute(send.rest, r'megascale_transfer_type="(\w+)"')
  slices = _attribute(send.rest, r'megascale_target="\{([\d,]+)\}').count(",") + 1
  number = round(_array_bytes(send.shape)[0])
  part = (slices - 1) / slices
  return Collective(
    kind=kind.lower().replace("_", "-"),
    axis=axis,
    count=count,
    bytes=number,
    wire_bytes=round(number * part * (2 if kind == "ALL_REDUCE" else 1)),
    source="",
    operation="",
    across=True,
  )


@dataclasses.dataclass
class _Tables:
  """Source locations of instructions, as newer compilers print them."""

  files: dict[int, str]
  locations: dict[int, tuple[int, int]]
  frames: dict[int, tuple[int, int]]

  def source(self, frame: int) -> str:
    """Returns the innermost line of moejax on the stack, else the innermost of all."""
    first, seen = "", set()
    while frame in self.frames and frame not in seen:
      seen.add(frame)
      location, frame = self.frames[frame]
      file, line = self.locations.get(location, (0, 0))
      text = f"{_short(self.files.get(file, ''))}:{line}"
      if "moejax/" in self.files.get(file, ""):
        return text
      first = first or text
    return first


def _tables(text: str) -> _Tables:
  def rows(title: str) -> list[str]:
    found = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    return found[1].splitlines() if found else []

  tables = _Tables({}, {}, {})
  for row in rows("FileNames"):
    number, _, name = row.partition(" ")
    tables.files[int(number)] = name.strip('"')
  for row in rows("FileLocations"):
    numbers = [int(n) for n in re.findall(r"\d+", row.replace("file_name_id", ""))]
    get = dict(re.findall(r"(\w+)=(\d+)", row))
    tables.locations[numbers[0]] = int(get["file_name_id"]), int(get["line"])
  for row in rows("StackFrames"):
    get = dict(re.findall(r"(\w+)=(\d+)", row))
    frame = int(row.split(" ")[0])
    parent = int(get.get("parent_frame_id", 0))
    tables.frames[frame] = int(get["file_location_id"]), parent
  return tables


def _short(path: str) -> str:
  """Returns the path from `moejax/` on, or the file's name."""
  at = path.rfind("moejax/")
  return path[at:] if at >= 0 else path.rsplit("/", 1)[-1]


def _joined(text: str) -> Iterator[str]:
  """Yields lines, rejoining instructions that a kernel's metadata breaks up."""
  held, depth = "", 0
  for line in text.splitlines():
    held = f"{held} {line.strip()}" if held else line
    if held.startswith(" "):  # An instruction, not the start or end of a computation.
      bare = _QUOTED.sub("", line)
      depth += bare.count("{") - bare.count("}")
    if depth <= 0:
      yield held
      held, depth = "", 0


def _parse(line: str) -> Instruction | None:
  found = _INSTRUCTION.match(line)
  if not found:
    return None
  rest = line[found.end() :]
  shape, rest = _split_shape(rest)
  opcode, _, rest = rest.partition("(")
  return Instruction(found[1], shape, opcode.strip(), rest)


def _split_shape(text: str) -> tuple[str, str]:
  if not text.startswith("("):
    shape, _, rest = text.partition(" ")
    return shape, rest
  depth = 0
  for index, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if depth == 0:
      return text[: index + 1], text[index + 1 :].lstrip()
  return text, ""


def _array_bytes(shape: str) -> list[float]:
  """Returns the bytes of each array of a shape, ignoring layouts."""
  result = []
  for dtype, dims in _ARRAY.findall(_LAYOUT.sub("", shape)):
    digits = re.search(r"\d+", dtype)
    width = _BYTES.get(dtype, int(digits[0]) / 8 if digits else 4)
    result.append(width * math.prod(int(d) for d in dims.split(",") if d))
  return result


def _elements(shape: str) -> list[str]:
  """Returns the outermost elements of a tuple's shape; any other shape by itself."""
  shape = _LAYOUT.sub("", shape).strip()
  if not shape.startswith("("):
    return [shape]
  elements, depth = [""], 0
  for character in shape[1:-1]:
    depth += (character in "([") - (character in ")]")
    if character == "," and depth == 0:
      elements.append("")
    else:
      elements[-1] += character
  return elements


def called(rest: str) -> list[tuple[str, str]]:
  """Returns (role, computation) of each computation that an instruction calls."""
  found = [(role, name) for role, name in _CALLED.findall(rest)]
  for names in _BRANCHES.findall(rest):
    found += [("branch", name.strip().lstrip("%")) for name in names.split(",")]
  return found


def _first_name(rest: str) -> str:
  """Returns the name of the first operand."""
  found = re.match(r"[^%)]*%([\w.\-]+)", rest)
  return found[1] if found else ""


def _constant(instruction: Instruction) -> int | None:
  """Returns the value of an integer constant; None for anything else."""
  found = re.match(r"(\d+)\)", instruction.rest)
  return int(found[1]) if instruction.opcode == "constant" and found else None


def _attribute(rest: str, pattern: str) -> str:
  found = re.search(pattern, rest)
  return found[1] if found else ""
