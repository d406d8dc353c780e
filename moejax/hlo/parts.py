"""The part of a train step that each instruction of a compiled program belongs to.

The part is the innermost scope (`moejax.parts`) in the instruction's metadata, and it is
backward if jax traced it as a transpose. For instructions that the compiler made:

  a fusion          is split over the parts of the instructions in it, by the elements
                    that they write and the FLOPs of products among them; `is_mixed` if
                    that is more than one part
  a copy or other   takes the part of its first operand that has one, else of its first
  helper            user, since it moves that operand's data
  a loop or call    takes its own scope, else the part of most instructions inside; only
                    its own time counts there, not that of the instructions it runs
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

from moejax.hlo.flops import Instruction, flops_of
from moejax.hlo.parse import KINDS, Program, called
from moejax.parts import PARTS, PREFIX

_NAME = re.compile(r'op_name="([^"]*)"')
_SCOPE = re.compile(rf"{PREFIX}({'|'.join(PARTS)})\b")
_OPERAND = re.compile(r"%([\w.\-]+)")
_SHAPE = re.compile(r"\[([\d,]*)\]")
_BACKWARD = "transpose("
_CONTROL = ("while", "conditional", "call")
_FREE = (
  "parameter",
  "constant",
  "bitcast",
  "broadcast",
  "iota",
  "reshape",
  "tuple",
  "get-tuple-element",
)
"""Opcodes that do no work inside a fusion."""

_FLOPS_PER_ELEMENT = 16.0
"""FLOPs of a product in the time of one element of elementwise work."""

_ROUNDS = 8
"""How far a part is passed along helpers, in instructions."""


@dataclasses.dataclass(frozen=True)
class Label:
  """The part that an instruction belongs to, and whether it is backward."""

  part: str
  """One of PARTS."""
  backward: bool


Shares = Mapping[Label, float]
"""The labels of an instruction; the shares add up to 1."""


def is_mixed(shares: Shares) -> bool:
  """Returns whether an instruction does the work of several parts."""
  return len({label.part for label in shares}) > 1


def label_of(operation: str) -> Label | None:
  """Returns the label of a jax operation, such as `jit(step)/jvp(moejax_head)/dot`."""
  found = _SCOPE.findall(operation)
  return Label(found[-1], _BACKWARD in operation) if found else None


def labels(program: Program) -> dict[str, Shares]:
  """Returns the labels of each instruction that has any, by the instruction's name."""
  found: dict[str, Shares] = {}
  everything = program.computations.values()
  work = _work(program)
  for instruction in itertools.chain(*everything):
    name = _NAME.search(instruction.rest)
    if name and (label := label_of(name[1])):
      found[instruction.name] = {label: 1.0}
  for instruction in itertools.chain(*everything):
    weights = _weights(_inside(program, instruction), found, work)
    if instruction.opcode == "fusion" and weights:
      total = sum(weights.values())
      found[instruction.name] = {
        label: weight / total for label, weight in weights.items()
      }
    elif weights:
      found.setdefault(instruction.name, {max(weights, key=weights.__getitem__): 1.0})
  for instructions in everything:
    _inherit(instructions, found)
  return found


def control(program: Program) -> set[str]:
  """Returns the names of loops, calls and conditionals, whose time is that of others."""
  return {
    instruction.name
    for instructions in program.computations.values()
    for instruction in instructions
    if instruction.opcode in _CONTROL
  }


def collectives(program: Program) -> set[str]:
  """Returns the names of the instructions that move data between devices."""
  return {
    instruction.name
    for instructions in program.computations.values()
    for instruction in instructions
    if instruction.opcode.removesuffix("-start").removesuffix("-done") in KINDS
  }


def _inside(program: Program, instruction: Instruction) -> list[Instruction]:
  """Returns the instructions that a fusion, call or loop runs, including nested ones."""
  if instruction.opcode not in ("fusion", *_CONTROL):
    return []
  result: list[Instruction] = []
  for _, name in called(instruction.rest):
    for inner in program.computations.get(name, ()):
      result += [inner, *_inside(program, inner)]
  return result


def _weights(
  inside: Sequence[Instruction], found: Mapping[str, Shares], work: Mapping[str, float]
) -> dict[Label, float]:
  """Returns the work of the instructions with each label."""
  weights: dict[Label, float] = collections.defaultdict(float)
  for instruction in inside:
    if instruction.opcode not in _FREE:
      for label, share in found.get(instruction.name, {}).items():
        weights[label] += share * work[instruction.name]
  return dict(weights)


def _work(program: Program) -> dict[str, float]:
  """Returns the assumed cost of each instruction, in elements written."""
  work = {}
  for instructions in program.computations.values():
    shapes = {i.name: i.shape for i in instructions}
    for instruction in instructions:
      flops = flops_of(instruction, shapes, 1.0) if instruction.opcode == "dot" else 0.0
      work[instruction.name] = _elements(instruction) + flops / _FLOPS_PER_ELEMENT
  return work


def _elements(instruction: Instruction) -> int:
  """Returns the elements of the largest array that an instruction writes, at least 1."""
  return max(
    (
      math.prod(int(d) for d in dims.split(",") if d)
      for dims in _SHAPE.findall(instruction.shape)
    ),
    default=1,
  )


def _inherit(instructions: Sequence[Instruction], found: dict[str, Shares]) -> None:
  """Labels instructions without a scope like their operands, else like their users."""
  operands = {
    i.name: _OPERAND.findall(i.rest.partition("metadata=")[0]) for i in instructions
  }
  users: dict[str, list[str]] = collections.defaultdict(list)
  for name, used in operands.items():
    for operand in used:
      users[operand].append(name)
  # A tuple belongs to the loop that takes it, not to whatever its first item is.
  whole = {i.name for i in instructions if i.opcode == "tuple"}
  passes = ((operands, operands.keys() - whole), (users, operands.keys()))
  for around, names in passes:
    for _ in range(_ROUNDS):
      new: dict[str, Shares] = {}
      # Not `names - found.keys()`, which iterates over all of `found`.
      for name in [n for n in names if n not in found]:
        near = next((found[n] for n in around.get(name, ()) if n in found), None)
        if near:
          new[name] = {max(near, key=near.__getitem__): 1.0}
      if not new:
        break
      found.update(new)
