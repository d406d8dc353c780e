"""What a compiled train step sends, as rows, and what of it nobody asked for.

`tools.collectives` prints all rows; a run on a mesh looks once, when its step has been
compiled, and warns of those that `intended` has no reason for. A missing axis in a
sharding rule makes no error: it makes the compiler move what should have stayed.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from moejax.config import Config
from moejax.config.mesh import AXES
from moejax.hlo import intended
from moejax.hlo import parse as hlo

Row = dict[str, Any]
"""The fields of an `hlo.Collective`, `count` over all its equals; `bytes_per_chip`, what
a device sends in a step; `purpose`, empty where nothing asks for it."""


def rows_of(
  config: Config,
  text: str,
  sizes: Sequence[int],
  platform: str = "",
  slices: int = 1,
) -> list[Row]:
  """One row per kind, axis, buffer and line, the largest traffic first.

  Args:
    config: of the run whose train step was compiled.
    text: of the optimised program.
    sizes: of the mesh's axes.
    platform: that it was compiled for: what one compiler cannot do better is no
      complaint there.
    slices: of TPUs, which share the mesh along `mesh.slice_axis`.
  """
  across = config.mesh.slice_axis
  sizes = [n // slices if a == across else n for a, n in zip(AXES, sizes, strict=True)]
  counts: collections.Counter[hlo.Collective] = collections.Counter()
  for found in hlo.Program(text).collectives(AXES, sizes, across):
    counts[dataclasses.replace(found, count=1, operation="")] += found.count
  rows = [
    dataclasses.asdict(found)
    | {
      "count": count,
      "bytes_per_chip": count * found.wire_bytes,
      "purpose": intended.reason(found, config, platform),
    }
    for found, count in counts.items()
  ]
  return sorted(rows, key=lambda row: -row["bytes_per_chip"])


def complaint(rows: Sequence[Row], command: str) -> str:
  """What to tell whoever started the run; empty if everything is as intended.

  Args:
    rows: from `rows_of`.
    command: that prints the whole table.
  """
  stray = [row for row in rows if not row["purpose"]]
  if not stray:
    return ""
  sent = sum(row["bytes_per_chip"] for row in stray)
  everything = sum(row["bytes_per_chip"] for row in rows)
  lines = [
    f"The train step moves {sent:,} bytes per device and step, of {everything:,}, that "
    "no sharding rule asks for:"
  ]
  lines += [
    f"  {row['kind']} over {row['axis']}, {row['count']} x {row['bytes']:,} bytes, "
    f"{row['source'] or 'line unknown'}"
    for row in stray
  ]
  lines.append(f"All of it, and what it is for: {command} (docs/collectives.md).")
  return "\n".join(lines)
