"""The traffic of a compiled train step, as rows, and which of them are unintended.

`tools.collectives` prints all rows; a run on a mesh checks them once, after compiling its
step, and warns of those for which `intended` has no reason. A missing axis in a sharding
rule raises no error: the compiler moves data that should have stayed in place.
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
"""The fields of an `hlo.Collective`, with `count` summed over equal ones;
`bytes_per_chip`, sent by a device per step; `purpose`, empty if nothing requires it."""


def rows_of(
  config: Config,
  text: str,
  sizes: Sequence[int],
  platform: str = "",
  slices: int = 1,
) -> list[Row]:
  """Returns one row per kind, axis, buffer size and line, largest traffic first.

  Args:
    config: of the run whose train step was compiled.
    text: of the optimised program.
    sizes: of the mesh's axes, over all slices.
    platform: compile target; limitations of its compiler are excused.
    slices: number of TPU slices, which divide the mesh along `mesh.slice_axis`.
  """
  across = config.mesh.slice_axis
  sizes = [n // slices if a == across else n for a, n in zip(AXES, sizes, strict=True)]
  counts: collections.Counter[tuple[hlo.Collective, str]] = collections.Counter()
  for found in hlo.Program(text).collectives(AXES, sizes, across):
    # The operation has a different name per call, which would keep rows apart; only the
    # purpose needs it.
    purpose = intended.reason(found, config, platform)
    counts[dataclasses.replace(found, count=1, operation=""), purpose] += found.count
  rows = [
    dataclasses.asdict(found)
    | {
      "count": count,
      "bytes_per_chip": count * found.wire_bytes,
      "purpose": purpose,
    }
    for (found, purpose), count in counts.items()
  ]
  return sorted(rows, key=lambda row: -row["bytes_per_chip"])


def complaint(rows: Sequence[Row], command: str) -> str:
  """Returns the warning for the user; empty if everything is as intended.

  Args:
    rows: from `rows_of`.
    command: the command that prints the whole table.
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
  lines.append(f"All traffic, and its purpose: {command} (docs/collectives.md).")
  return "\n".join(lines)
