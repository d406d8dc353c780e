"""Searches the ways to run a config on machines for the fastest or cheapest that fits."""

import copy
import dataclasses
import math
from collections.abc import Sequence

from moejax.config import Config
from moejax.config.mesh import AXES
from moejax.cost.chips import Chip
from moejax.errors import UserError
from moejax.plan import candidates as candidates_lib
from moejax.plan.candidates import Candidate, Refusals
from moejax.plan.predict import flops as flops_lib
from moejax.plan.predict import links, memory, time, wire
from moejax.plan.predict.load import Load
from moejax.plan.predict.memory import Memory
from moejax.plan.predict.time import StepTime
from moejax.plan.predict.weights import Shares, Weight, weights_of
from moejax.plan.predict.wire import Gradients, Sent
from moejax.plan.topology import Topology

MARGIN = 0.1
"""Fraction of memory left free, to cover prediction errors (docs/planning.md)."""

_HOUR, _DAY = 3600.0, 86_400.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """A candidate with its predicted memory, FLOPs and time."""

  candidate: Candidate
  load: Load
  memory: Memory
  hbm_bytes: int
  flops: dict[str, float]
  """FLOPs that a device executes in a step, by part and in `total`."""
  sent: list[Sent]
  time: StepTime
  tokens: int
  """Tokens per step, over all devices."""
  chips: int
  least: float
  """Bytes that a device needs under any settings; see `OnMesh.least`."""

  @property
  def tokens_per_second(self) -> float:
    return self.tokens / self.time.step

  def days(self, tokens: float) -> float:
    """Returns how many days it takes to train on `tokens` tokens."""
    return tokens / self.tokens_per_second / _DAY

  def chip_hours(self, tokens: float) -> float:
    return self.days(tokens) * self.chips * _DAY / _HOUR


@dataclasses.dataclass(kw_only=True)
class Found:
  """The result of a search."""

  plans: list[Plan]
  """The best plan of each mesh with one that fits, best first."""
  too_large: list[Plan]
  """The smallest plan of each mesh with none that fits, smallest first."""
  considered: int = 0
  fitting: int = 0
  refused: Refusals = dataclasses.field(default_factory=Refusals)
  lacking: dict[str, str] = dataclasses.field(default_factory=dict)
  """For each machine on which nothing fits: a sentence on the nearest plan and what it
  lacks."""

  def add(self, other: "Found") -> None:
    """Adds the results of another machine."""
    self.plans += other.plans
    self.too_large += other.too_large
    self.considered += other.considered
    self.fitting += other.fitting
    self.refused.merge(other.refused)

  def best(self, most: int) -> list[tuple[int, Plan]]:
    """Returns the best `most` plans and the best of each machine, with their ranks."""
    seen: set[Topology] = set()
    chosen = []
    for rank, plan in enumerate(self.plans, start=1):
      if rank <= most or plan.candidate.topology not in seen:
        chosen.append((rank, plan))
      seen.add(plan.candidate.topology)
    return chosen


def search(
  config: Config,
  topologies: Sequence[Topology],
  *,
  prices: dict[str, float] | None = None,
  margin: float = MARGIN,
  efficiency: float = time.EFFICIENCY,
) -> Found:
  """Searches all candidates on all machines.

  Args:
    config: validated.
    topologies: machines to compare.
    prices: dollars per chip hour by kind; ranks by cost if given, else by throughput.
    margin: fraction of memory that must stay free.
    efficiency: fraction of a chip's peak at which products run.

  Raises:
    UserError: nothing fits on any machine; the message names the nearest plan of each and
      what it lacks.
  """
  refuse_unplanned(config, topologies)
  weights = weights_of(config)
  found, remedies = Found(plans=[], too_large=[]), []
  for topology in topologies:
    own = Found(plans=[], too_large=[])
    _search_one(config, topology, weights, margin, efficiency, own)
    own.too_large.sort(key=lambda plan: plan.memory.total / plan.hbm_bytes)
    if not own.plans:
      found.lacking[topology.name], remedy = _nothing(own, topology, margin)
      remedies += [remedy] * bool(remedy)
    found.add(own)

  def value(plan: Plan) -> float:
    price = 1.0 if prices is None else prices[plan.candidate.topology.kind]
    return plan.chip_hours(1.0) * price if prices else plan.time.step / plan.tokens

  found.plans.sort(key=value)
  found.too_large.sort(key=lambda plan: plan.memory.total / plan.hbm_bytes)
  if not found.plans:
    raise UserError(" ".join((*found.lacking.values(), *dict.fromkeys(remedies))))
  return found


def refuse_unplanned(config: Config, topologies: Sequence[Topology]) -> None:
  """Raises an error for a config or machine that the formulas here do not cover.

  Raises:
    UserError: an encoder-decoder, a router that mixes tokens, or a chip of unknown peak.
  """
  from moejax.config.router import make_router

  if config.model.kind != "decoder":
    raise UserError(
      f"--config.model.kind={config.model.kind}: only decoders can be planned. Compile a "
      "mesh of your own with tools.compile_for."
    )
  if make_router(config.moe).mixes:
    raise UserError(
      f"--config.moe.router={config.moe.router} mixes tokens, which cannot be planned. "
      "Compile a mesh of your own with tools.compile_for."
    )
  for topology in topologies:
    if not candidates_lib.chip_of(topology).flops:
      raise UserError(
        f"--topology={topology}: the peak of {topology.kind} is unknown, so no time can "
        "be predicted. Name TPUs or GPUs, such as v5p:4x4x8."
      )


def _search_one(
  config: Config,
  topology: Topology,
  weights: tuple[Weight, ...],
  margin: float,
  efficiency: float,
  found: Found,
) -> None:
  """Adds the best plan of each mesh of one machine to `found`."""
  chip, best = candidates_lib.chip_of(topology), {}
  room = (1 - margin) * chip.hbm_bytes
  trial, refused = copy.deepcopy(config), found.refused
  ways = candidates_lib.Variants(config, chip.family, refused)
  on: OnMesh | None = None
  for placement in candidates_lib.placements(config, topology, weights, refused):
    key = (*placement.mesh.values(), placement.settings["mesh.slice_axis"])
    if on is None or on.key != key:
      on = OnMesh.of(config, placement, weights, chip)
    for candidate, load in ways.of(placement):
      found.considered += 1
      if on.least > room and candidate.settings["model.remat"] != "all":
        # Parameters, gradients and moments alone do not fit. The smallest plan shows how
        # much is missing.
        refused.add("", reason="memory")
        continue
      plan = evaluate(trial, candidate, load, on, efficiency)
      fits = plan.memory.total <= room
      found.fitting += fits
      if not fits:
        refused.add("", reason="memory")
      if key not in best or _better(plan, best[key], room):
        best[key] = plan
  for plan in best.values():
    fits = plan.memory.total <= room
    (found.plans if fits else found.too_large).append(plan)


def _better(one: Plan, other: Plan, room: float) -> bool:
  """Returns whether a plan is faster, or smaller if neither fits."""
  fits, other_fits = one.memory.total <= room, other.memory.total <= room
  if fits and other_fits:
    return one.time.step < other.time.step
  return fits or (not other_fits and one.memory.total < other.memory.total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnMesh:
  """Values that all candidates of one mesh share."""

  key: tuple[int | str, ...]
  shares: Shares
  sums: Gradients
  spans: dict[str, links.Span]
  chip: Chip

  @classmethod
  def of(
    cls, config: Config, placement: Candidate, weights: tuple[Weight, ...], chip: Chip
  ) -> "OnMesh":
    mesh, across = placement.mesh, placement.settings["mesh.slice_axis"]
    shares = Shares(weights, mesh, config.optimizer.name)
    return cls(
      key=(*mesh.values(), across),
      shares=shares,
      sums=wire.gradients(config, shares, chip.family),
      spans=links.spans(placement.topology, mesh, across),
      chip=chip,
    )

  @property
  def least(self) -> float:
    """Bytes that a device needs under any settings."""
    return self.shares.parameters + self.shares.moments + self.shares.gradients


def evaluate(
  config: Config,
  candidate: Candidate,
  load: Load,
  on: OnMesh,
  efficiency: float = time.EFFICIENCY,
) -> Plan:
  """Returns the plan of a candidate; sets its settings in `config`, which must allow
  them."""
  candidates_lib.apply(config, candidate.settings)
  topology, chip = candidate.topology, on.chip
  need = memory.predicted(config, load, on.shares)
  flops = flops_lib.executed_flops(config, load)
  rows = wire.sent(config, load, on.shares, on.sums)
  taken = time.step_time(
    *(config, load, need, flops["total"], rows, on.spans, chip), efficiency=efficiency
  )
  return Plan(
    candidate=candidate,
    load=load,
    memory=need,
    hbm_bytes=chip.hbm_bytes,
    flops=flops,
    sent=rows,
    time=taken,
    tokens=config.train.batch_size * config.data.sequence_length,
    chips=topology.num_chips,
    least=on.least,
  )


def mesh_text(candidate: Candidate) -> str:
  """Returns a mesh in words, such as `fsdp 16 x expert 8`."""
  mesh = candidate.mesh
  return " x ".join(f"{a} {mesh[a]}" for a in AXES if mesh[a] > 1) or "one device"


def _nothing(own: Found, topology: Topology, margin: float) -> tuple[str, str]:
  """Describes the nearest plan on a machine where nothing fits, and what would help."""
  if not own.too_large:
    reason, count = own.refused.counts.most_common(1)[0]
    return (
      f"No mesh of {topology.name} runs the config; most ({count}) are refused for "
      f"--config.{reason}: {own.refused.examples[reason]}"
    ), ""
  nearest = own.too_large[0]
  need, room = nearest.memory.total, (1 - margin) * nearest.hbm_bytes
  candidate = nearest.candidate
  kinds = sorted(nearest.memory.kinds.items(), key=lambda item: -item[1])[:3]
  parts = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in kinds)
  text = (
    f"Nothing fits on {topology.name}, of {own.considered:,} ways. The nearest is "
    f"{mesh_text(candidate)} with "
    f"--config.train.accumulation={candidate.settings['train.accumulation']} "
    f"--config.model.remat={candidate.settings['model.remat']}: {need / 1e9:.1f} GB per "
    f"device ({parts}), {(need - room) / 1e9:.1f} more than the {room / 1e9:.1f} that "
    f"--margin={margin:g} leaves."
  )
  least = min(plan.least for plan in own.too_large)
  if least < room:
    return text, (
      "Name a larger machine, or lower --config.moe.exchange_buffer or "
      "--config.train.batch_size."
    )
  # No batch size would help.
  total = least * topology.num_devices
  return text, (
    f"Parameters, moments and gradients alone are {total / 1e9:,.0f} GB, more than "
    f"{math.floor(total / room)} devices of {topology.kind} can hold: name a larger "
    "machine, or lower --config.model.num_layers."
  )
