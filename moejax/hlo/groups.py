"""The device groups of a collective, and the mesh axes that they span.

Three notations are read: lists of device numbers, iota tiles and mesh axes. The numbers
are positions in the program's mesh, in row-major order.
"""

import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

Groups = list[tuple[int, ...]]


def groups_of(rest: str) -> Groups | None:
  """Returns a collective's device groups; None if absent or in an unknown notation."""
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


def _mesh_groups(rest: str) -> Groups | None:
  """Returns groups written as mesh axes, whole or in part: 'a' or 'a':(4)2, the sub-axis
  of size 2 inside one of size 4."""
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


def _components(pairs: Sequence[tuple[str, str]]) -> Groups:
  """Returns the connected components of a permutation."""
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


def group_size(rest: str) -> int:
  groups = groups_of(rest)
  return len(groups[0]) if groups else 0


def axis_groups(
  axes: Sequence[str], sizes: Sequence[int]
) -> dict[frozenset[frozenset[int]], str]:
  """Maps device groups to the smallest set of axes that spans them."""
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


def axis_of(
  rest: str, groups: dict[frozenset[frozenset[int]], str], num_devices: int
) -> tuple[str, int]:
  """Returns the axes of an instruction's groups and the size of the largest group."""
  found = groups_of(rest)
  if found is None and (written := re.search(r"replica_groups=\S+", rest)):
    raise ValueError(f"device groups in an unknown format: {written[0]}")
  if not found:  # Without groups, all devices are one group.
    found = [tuple(range(num_devices))]
  key = frozenset(frozenset(group) for group in found)
  return groups.get(key, "?"), max(len(group) for group in found)
