"""Prints the result of a search: the best plans, the first in detail, and refusals."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moejax.plan.candidates import Candidate
from moejax.plan.search import Found, Plan, mesh_text
from moejax.plan.units import fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
  """What the user asked to see."""

  tokens: float
  """Tokens of the whole training run."""
  prices: Mapping[str, float]
  """Dollars per chip hour, by kind of chip."""
  margin: float


def machine_text(candidate: Candidate) -> str:
  """Returns a machine's name, with the axis that joins its slices, if several."""
  topology = candidate.topology
  if topology.slices == 1:
    return topology.name
  return f"{topology.name} along {candidate.settings['mesh.slice_axis']}"


def cost(plan: Plan, view: View) -> float | None:
  """Returns the cost of the whole training run in dollars; None without a price."""
  price = view.prices.get(plan.candidate.topology.kind)
  return None if price is None else price * plan.chip_hours(view.tokens)


def plans_table(plans: Sequence[tuple[int, Plan]], view: View) -> Table:
  """Returns one row per plan, given with its rank."""
  table = Table(box=box.SIMPLE_HEAD, title=f"best mesh first, {view.tokens:.3g} tokens")
  table.add_column("", justify="right")
  for header in ("machine", "mesh", "micro x steps", "remat", "rows travel by"):
    table.add_column(header, overflow="fold")
  for header in ("GB", "of", "FLOPs", "GB sent", "step s", "bound by", "Mtok/s", "days"):
    table.add_column(header, justify="right")
  if view.prices:
    table.add_column("$", justify="right")
  for rank, plan in plans:
    settings, load = plan.candidate.settings, plan.load
    travel = f"{load.exchange}, {load.dispatcher}"
    travel += f" / {load.parts}" if load.parts > 1 else ""
    cells = [
      str(rank),
      machine_text(plan.candidate),
      mesh_text(plan.candidate),
      f"{load.sequences} x {load.microbatches}",
      settings["model.remat"],
      travel,
      fixed(plan.memory.total / 1e9, 1),
      f"{plan.hbm_bytes / 1e9:.0f}",
      fixed(plan.flops["total"] / 1e12, 0) + "T",
      fixed(sum(row.bytes for row in plan.sent) / 1e9, 1),
      fixed(plan.time.step, 2),
      plan.time.bound_by,
      f"{plan.tokens_per_second / 1e6:.3f}",
      fixed(plan.days(view.tokens), 1),
    ]
    dollars = cost(plan, view)
    if view.prices:
      cells.append("" if dollars is None else fixed(dollars, 0))
    table.add_row(*cells)
  return table


def detail(plan: Plan) -> list[str]:
  """Returns lines about a plan: memory by kind, traffic by collective, time by cause."""
  memory = ", ".join(
    f"{kind} {fixed(size / 1e9, 1)}" for kind, size in plan.memory.kinds.items() if size
  )
  rows = sorted(plan.sent, key=lambda row: -row.bytes)
  traffic = ", ".join(
    f"{row.purpose} by {row.kind} over {row.axis} {fixed(row.bytes / 1e9, 2)}"
    for row in rows
    if row.bytes > 1e-3 * rows[0].bytes
  )
  flops = ", ".join(
    f"{part.replace('_', ' ')} {fixed(count / 1e12, 1)}"
    for part, count in plan.flops.items()
    if count and part != "total"
  )
  time = plan.time
  networks = "".join(
    f", {name} {fixed(value, 2)}" for name, value in time.networks.items()
  )
  return [
    f"The first, per device and step. GB in memory ({plan.memory.peak} at the peak): "
    f"{memory}.",
    f"GB sent: {traffic or 'nothing'}.",
    f"TFLOPs executed: {flops}.",
    f"Seconds: compute {fixed(time.compute, 2)}, hbm {fixed(time.hbm, 2)}{networks}, all "
    f"at the same time, then {fixed(time.exposed, 2)} of communication that nothing "
    "overlaps.",
  ]


def refusals_table(found: Found) -> Table:
  """Returns the reasons why combinations were left out, most common first."""
  table = Table(box=box.SIMPLE_HEAD, title="left out")
  table.add_column("ways", justify="right")
  table.add_column("reason")
  table.add_column("such as", overflow="fold")
  for reason, count in found.refused.counts.most_common():
    name = "does not fit in memory" if reason == "memory" else f"--config.{reason}"
    table.add_row(f"{count:,}", name, found.refused.examples.get(reason, ""))
  return table


def show(
  found: Found, plans: Sequence[tuple[int, Plan]], view: View, console: Console
) -> None:
  """Prints the result of a search; `plans` are those to show, with their ranks."""
  console.print(plans_table(plans, view))
  for line in found.lacking.values():
    console.print(line, markup=False, highlight=False, soft_wrap=True)
  for line in detail(plans[0][1]):
    console.print(line, markup=False, highlight=False)
  console.print(refusals_table(found))
  console.print(
    f"{found.fitting:,} of {found.considered:,} ways that run fit with {view.margin:.0%} "
    f"of memory to spare, on {len(found.plans)} of "
    f"{len(found.plans) + len(found.too_large)} meshes.",
    markup=False,
  )


def as_json(found: Found, view: View) -> dict[str, Any]:
  """Returns everything as plain values, plans in the order of `found`."""
  return {
    "tokens": view.tokens,
    "considered": found.considered,
    "fitting": found.fitting,
    "left_out": dict(found.refused.counts),
    "nothing_fits": found.lacking,
    "plans": [plan_json(plan, view) for plan in found.plans],
    "too_large": [plan_json(plan, view) for plan in found.too_large],
  }


def plan_json(plan: Plan, view: View) -> dict[str, Any]:
  """Returns one plan as plain values: bytes, FLOPs and seconds per device and step."""
  return {
    "topology": str(plan.candidate.topology),
    "slices": plan.candidate.topology.slices,
    "settings": plan.candidate.settings,
    "memory_bytes": dict(plan.memory.kinds) | {"total": plan.memory.total},
    "hbm_bytes": plan.hbm_bytes,
    "flops": plan.flops,
    "sent": [dataclasses.asdict(row) for row in plan.sent],
    "seconds": dataclasses.asdict(plan.time) | {"step": plan.time.step},
    "bound_by": plan.time.bound_by,
    "tokens_per_second": plan.tokens_per_second,
    "days": plan.days(view.tokens),
    "chip_hours": plan.chip_hours(view.tokens),
    "dollars": cost(plan, view),
  }
