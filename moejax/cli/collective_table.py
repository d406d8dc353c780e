"""The table of collectives printed by `tools.collectives` and `tools.compile_for`."""

from typing import Any

from rich import box
from rich.table import Table


def make_table(rows: list[dict[str, Any]]) -> Table:
  table = Table(box=box.SIMPLE_HEAD)
  for name in ("kind", "axis", "count", "buffer", "sent/step", "line", "for"):
    right = name in ("count", "buffer", "sent/step")
    table.add_column(name, justify="right" if right else "left")
  for row in rows:
    table.add_row(
      row["kind"],
      row["axis"],
      str(row["count"]),
      f"{row['bytes']:,}",
      f"{row['bytes_per_chip']:,}",
      row["source"],
      row["purpose"] or "NOT INTENDED",
    )
  return table
