"""What did the compiler send? Reads the collectives out of an optimised program.

Counts what runs, not what is written: an instruction in a loop counts as often as the
loop turns. Bytes are those of one device: `bytes` the buffer that takes part (operand of
an all-to-all, result of an all-gather, operand of a reduce-scatter or all-reduce),
`wire_bytes` what the device must send with n devices in a group: (n-1)/n of the buffer,
twice that for an all-reduce, all of it for a permute.

The text form is what there is: jax has no public interface to compiled instructions.
Spellings handled: start/done pairs, tuples of buffers, replica groups as lists, as iota
tiles and as mesh axes, reduce-scatters that a TPU fuses around an all-reduce.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

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
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """All executions of one instruction, on one device."""

  kind: str
  axis: str
  """Mesh axes of its groups, joined by commas; `?` where no axes make such groups."""
  count: int
  """How often it runs in a step."""
  bytes: int
  """Of its buffer, once."""
  wire_bytes: int
  """That the device sends, once."""
  source: str
  """file:line of moejax that it comes from, as far as the compiler says."""
  operation: str
  """The jax operation it comes from."""


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  rest: str


class Program:
  """A compiled program's computations, from `compiled.as_text()`."""

  def __init__(self, text: str):
    self._computations: dict[str, list[_Instruction]] = {}
    self._entry = ""
    self._tables = _tables(text)
    current: list[_Instruction] | None = None
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

  def collectives(self, axes: Sequence[str], sizes: Sequence[int]) -> list[Collective]:
    """Every collective that runs, in the order of the text.

    Args:
      axes: names of the mesh's axes, outermost first.
      sizes: devices along each.
    """
    groups = _axis_groups(axes, sizes)
    result = []
    for instruction, count, inside in self._executed(self._entry, 1, ""):
      kind = instruction.opcode.removesuffix("-start")
      if kind not in KINDS:
        continue
      if kind == "all-reduce" and "all-reduce-scatter" in inside:
        kind = "reduce-scatter"
      axis, size = _axis_of(instruction.rest, groups, math.prod(sizes))
      if size == 1:
        continue
      number = self._buffer_bytes(instruction, kind)
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

  def _executed(
    self, name: str, count: int, inside: str
  ) -> Iterator[tuple[_Instruction, int, str]]:
    for instruction in self._computations.get(name, ()):
      yield instruction, count, inside
      times = self._trips(instruction) if instruction.opcode == "while" else 1
      for role, called in _called(instruction.rest):
        if role == "to_apply" and instruction.opcode != "call":
          continue  # The scalar function of a reduction.
        yield from self._executed(called, count * times, called)

  def _trips(self, instruction: _Instruction) -> int:
    """How often a loop turns; 1 where it is only known when it runs."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', instruction.rest)
    if known:
      return int(known[1])
    condition = dict(_called(instruction.rest)).get("condition", "")
    bounds = [
      int(found[1])
      for i in self._computations.get(condition, ())
      if i.opcode == "constant" and (found := re.match(r"(\d+)\)", i.rest))
    ]
    return bounds[0] if len(bounds) == 1 else 1

  def _buffer_bytes(self, instruction: _Instruction, kind: str) -> int:
    arrays = _array_bytes(instruction.shape)
    if instruction.opcode.endswith("-start") and len(arrays) > 1:
      # (operands, results, contexts): of a gather the result, else the operand.
      arrays = [max(arrays)]
    if kind == "reduce-scatter":
      size = _group_size(instruction.rest)
      return round(sum(arrays) * (size or 1))
    return round(sum(arrays))

  def _source(self, rest: str) -> str:
    direct = re.search(r'source_file="([^"]*)" source_line=(\d+)', rest)
    if direct:
      return f"{_short(direct[1])}:{direct[2]}"
    frame = re.search(r"stack_frame_id=(\d+)", rest)
    return self._tables.source(int(frame[1])) if frame else ""


@dataclasses.dataclass
class _Tables:
  """Where instructions come from, as newer compilers print it."""

  files: dict[int, str]
  locations: dict[int, tuple[int, int]]
  frames: dict[int, tuple[int, int]]

  def source(self, frame: int) -> str:
    """The innermost line of moejax on the stack, else the innermost of all."""
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
  """The path from `moejax/` on, or the file's name."""
  at = path.rfind("moejax/")
  return path[at:] if at >= 0 else path.rsplit("/", 1)[-1]


def _joined(text: str) -> Iterator[str]:
  """Lines, with instructions that a kernel's metadata breaks put together again."""
  held = ""
  for line in text.splitlines():
    held = f"{held} {line.strip()}" if held else line
    if held.count('"') % 2 == 0:
      yield held
      held = ""


def _parse(line: str) -> _Instruction | None:
  found = _INSTRUCTION.match(line)
  if not found:
    return None
  rest = line[found.end() :]
  shape, rest = _split_shape(rest)
  opcode, _, rest = rest.partition("(")
  return _Instruction(found[1], shape, opcode.strip(), rest)


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
  """Bytes of each array of a shape, layouts left out."""
  result = []
  for dtype, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
    digits = re.search(r"\d+", dtype)
    width = _BYTES.get(dtype, int(digits[0]) / 8 if digits else 4)
    result.append(width * math.prod(int(d) for d in dims.split(",") if d))
  return result


def _called(rest: str) -> list[tuple[str, str]]:
  found = [(role, name) for role, name in _CALLED.findall(rest)]
  for names in _BRANCHES.findall(rest):
    found += [("branch", name.strip().lstrip("%")) for name in names.split(",")]
  return found


def _attribute(rest: str, pattern: str) -> str:
  found = re.search(pattern, rest)
  return found[1] if found else ""


def groups_of(rest: str) -> list[tuple[int, ...]] | None:
  """The device groups of a collective; None where they are not written as numbers."""
  pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest)
  if pairs:
    return _components(re.findall(r"\{(\d+),(\d+)\}", pairs[1]))
  listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest)
  if listed:
    texts = re.findall(r"\{([\d,]+)\}", listed[1])
    return [tuple(int(n) for n in text.split(",")) for text in texts]
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
  if iota:
    shape, dims = _numbers(iota[1]), _numbers(iota[2])
    ids = np.arange(math.prod(dims)).reshape(dims)
    if iota[3]:
      ids = ids.transpose(_numbers(iota[3]))
    return [tuple(row) for row in ids.reshape(shape).tolist()]
  return _mesh_groups(rest)


def _mesh_groups(rest: str) -> list[tuple[int, ...]] | None:
  """Groups spelt as axes of a mesh, whole or in part: 'a' or 'a':(4)2, where 2 of the
  axis's devices make a group and 4 stand before them."""
  found = re.search(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
    rest,
  )
  if not found:
    return None
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
  ids = np.arange(math.prod(sizes.values()))
  if found[2]:
    ids = ids.reshape(_numbers(found[2]))
    ids = ids.transpose(_numbers(found[3])) if found[3] else ids
  taken = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[4])
  dims, chosen = [], []
  for name, size in sizes.items():
    parts = [(int(a), int(b)) for n, a, b in taken if n == name and b]
    if (name, "", "") in taken:
      parts = [(1, size)]
    done = 1
    for before, width in sorted(parts):
      dims += [before // done, width]
      chosen.append(len(dims) - 1)
      done = before * width
    dims.append(size // done)
  others = [d for d in range(len(dims)) if d not in chosen]
  width = math.prod(dims[d] for d in chosen)
  rows = ids.reshape(dims).transpose([*others, *chosen]).reshape(-1, width)
  return [tuple(row) for row in rows.tolist()]


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]


def _components(pairs: Sequence[tuple[str, str]]) -> list[tuple[int, ...]]:
  """Devices that a permutation connects."""
  groups: list[set[int]] = []
  for source, target in pairs:
    joined = {int(source), int(target)}
    apart = []
    for group in groups:
      if group & joined:
        joined |= group
      else:
        apart.append(group)
    groups = [*apart, joined]
  return [tuple(sorted(group)) for group in groups]


def _group_size(rest: str) -> int:
  groups = groups_of(rest)
  return len(groups[0]) if groups else 0


def _axis_groups(
  axes: Sequence[str], sizes: Sequence[int]
) -> dict[frozenset[frozenset[int]], str]:
  """The device groups that each set of axes makes; the smallest set that makes them."""
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  result: dict[frozenset[frozenset[int]], str] = {}
  for count in range(1, len(axes) + 1):
    for chosen in itertools.combinations(range(len(axes)), count):
      others = [a for a in range(len(axes)) if a not in chosen]
      width = math.prod(sizes[a] for a in chosen)
      rows = ids.transpose([*others, *chosen]).reshape(-1, width)
      key = frozenset(frozenset(row) for row in rows.tolist())
      result.setdefault(key, ",".join(axes[a] for a in chosen))
  return result


def _axis_of(
  rest: str, groups: dict[frozenset[frozenset[int]], str], num_devices: int
) -> tuple[str, int]:
  """The axes of an instruction's groups, and how many devices are in one."""
  found = groups_of(rest)
  if found is None and (written := re.search(r"replica_groups=\S+", rest)):
    raise ValueError(f"device groups in a spelling that is not known: {written[0]}")
  if not found:  # No groups are one group of all.
    found = [tuple(range(num_devices))]
  key = frozenset(frozenset(group) for group in found)
  return groups.get(key, "?"), max(len(group) for group in found)
