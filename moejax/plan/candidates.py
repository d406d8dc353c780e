"""The settings that a plan chooses, and every combination that the config's checks allow.

A plan chooses the mesh, microbatches, recomputation, and how rows are exchanged. The
model, global batch, capacity and buffers stay as configured, since they change what is
learned. Combinations are refused by the checks of a real run (`config.devices`,
`config.check`, `sharding`), so the printed command will be accepted.
"""

import collections
import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import AbstractMesh

from moejax.config import Config
from moejax.config import devices as config_devices
from moejax.config import text as config_text
from moejax.config.check import validate
from moejax.config.mesh import AXES, token_shards
from moejax.cost.chips import CHIPS, Chip
from moejax.errors import ConfigError
from moejax.plan.predict.load import Load, load_of
from moejax.plan.predict.weights import Weight
from moejax.plan.topology import Topology
from moejax.sharding.mesh import over_slices

REMAT = ("none", "dots", "full", "all")
_EXCHANGES = ("auto", "all_to_all", "ragged", "ring")
"""gspmd is left out: the compiler decides what it sends."""
_DISPATCHERS = ("auto", "gather", "grouped")
"""einsum is left out: it computes gather's products, and dense dispatch weights too."""
_CHUNKS = {"all_to_all": (1, 2, 4), "ragged": (1, 2, 4, 8, 16, 32)}

Settings = dict[str, Any]
"""Dotted field to value."""


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One way to run a config on a machine."""

  topology: Topology
  settings: Settings

  @property
  def mesh(self) -> dict[str, int]:
    return {axis: self.settings[f"mesh.{axis}"] for axis in AXES}


@dataclasses.dataclass
class Refusals:
  """Why combinations were left out: a count and an example of each reason."""

  counts: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  examples: dict[str, str] = dataclasses.field(default_factory=dict)

  def add(self, message: str, count: int = 1, reason: str = "") -> None:
    """Counts a refusal; its reason is the first flag that the message names."""
    flag = re.search(r"--config\.([\w.]+)", message)
    reason = reason or (flag[1] if flag else "other")
    self.counts[reason] += count
    self.examples.setdefault(reason, message)

  def merge(self, other: "Refusals") -> None:
    """Adds another's counts."""
    self.counts.update(other.counts)
    self.examples = other.examples | self.examples


def chip_of(topology: Topology) -> Chip:
  """Returns the figures of one device."""
  chip = CHIPS[topology.kind]
  return chip.divided(chip.devices)


def meshes(devices: int) -> Iterator[dict[str, int]]:
  """Yields every mesh of `devices` devices, with its axes in the order of `AXES`."""

  def splits(left: int, axes: int) -> Iterator[tuple[int, ...]]:
    if axes == 1:
      yield (left,)
      return
    for size in divisors(left):
      for rest in splits(left // size, axes - 1):
        yield (size, *rest)

  for sizes in splits(devices, len(AXES)):
    yield dict(zip(AXES, sizes, strict=True))


def divisors(number: int) -> list[int]:
  """Returns the divisors of a number, ascending."""
  small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
  return small + [number // n for n in reversed(small) if n * n != number]


def placements(
  config: Config, topology: Topology, weights: Sequence[Weight], refused: Refusals
) -> Iterator[Candidate]:
  """Yields the meshes and microbatches that the checks allow, other settings unchanged.

  Args:
    config: validated; not changed.
    topology: the machine.
    weights: of the model.
    refused: records what is left out.
  """
  trial, devices = copy.deepcopy(config), topology.num_devices
  slice_axes = AXES if topology.slices > 1 else (config.mesh.slice_axis,)
  for mesh, across in itertools.product(meshes(devices), slice_axes):
    settings: Settings = {f"mesh.{axis}": size for axis, size in mesh.items()}
    settings["mesh.slice_axis"] = across
    apply(trial, settings | {"train.accumulation": 1})
    problem = _mesh_problem(trial, topology, mesh, weights)
    if problem:
      refused.add(problem)
      continue
    shards = token_shards(mesh)
    for accumulation in divisors(config.train.batch_size // shards):
      yield Candidate(topology, settings | {"train.accumulation": accumulation})


def _mesh_problem(
  trial: Config, topology: Topology, mesh: dict[str, int], weights: Sequence[Weight]
) -> str | None:
  """Returns why no microbatch runs on a mesh: batch, model, slices or parameters."""
  # The exchange is chosen later, so the mesh is tried with the least restrictive one.
  trial.moe.exchange, trial.moe.dispatcher = "auto", "auto"
  trial.moe.exchange_chunks = 1
  problem = config_devices.misfit(trial, topology.num_devices)
  if problem:
    return problem
  try:
    if topology.slices > 1:
      over_slices(trial.mesh, tuple(mesh.values()), topology.slices)
    check_weights(weights, mesh)
  except ConfigError as error:
    return str(error)
  return None


def check_weights(weights: Sequence[Weight], mesh: dict[str, int]) -> None:
  """Raises the error that a run raises if its parameters cannot be cut over a mesh."""
  from moejax.sharding import rules

  abstract: Any = AbstractMesh(tuple(mesh.values()), AXES)
  for weight in weights:
    rules.shardings(abstract, {weight.path: weight.names}, {weight.path: weight})


class Variants:
  """The ways to recompute and exchange under a placement.

  They depend on a mesh only through the sizes of its token shards and of `expert`, so
  they are checked once for each of those.
  """

  def __init__(self, config: Config, family: str, refused: Refusals):
    """Initializes; `refused` records what is left out, once per placement."""
    self._trial, self._family, self._refused = copy.deepcopy(config), family, refused
    self._known: dict[tuple[int, ...], tuple[list[tuple[Settings, Load]], Refusals]] = {}

  def of(self, placement: Candidate) -> Iterator[tuple[Candidate, Load]]:
    """Yields each way once, with the load of one device."""
    mesh = placement.mesh
    shards = token_shards(mesh)
    key = (shards, mesh["expert"], placement.settings["train.accumulation"])
    if key not in self._known:
      refused = Refusals()
      self._known[key] = list(self._ways(placement, refused)), refused
    ways, refused = self._known[key]
    self._refused.merge(refused)
    for settings, load in ways:
      for remat in REMAT:
        chosen = placement.settings | settings | {"model.remat": remat}
        yield Candidate(placement.topology, chosen), load.on(mesh)

  def _ways(
    self, placement: Candidate, refused: Refusals
  ) -> Iterator[tuple[Settings, Load]]:
    trial, devices = self._trial, placement.topology.num_devices
    seen = set()
    for exchange, dispatcher in itertools.product(_EXCHANGES, _DISPATCHERS):
      for chunks in _CHUNKS["ragged"]:
        settings = {
          "moe.exchange": exchange,
          "moe.dispatcher": dispatcher,
          "moe.exchange_chunks": chunks,
        }
        apply(trial, placement.settings | settings)
        problem = config_devices.misfit(trial, devices)
        if problem:
          refused.add(problem, len(REMAT))
          break
        load = load_of(trial, placement.mesh, self._family)
        key = (load.exchange, load.dispatcher, load.parts)
        if chunks not in _CHUNKS.get(load.exchange, (1,)) or key in seen:
          continue
        seen.add(key)
        yield settings, load


def configured(config: Config, candidate: Candidate) -> Config:
  """Returns a copy of a config with a candidate's settings, as its flags make it."""
  own = copy.deepcopy(config)
  apply(own, candidate.settings)
  validate(own)
  return own


def changes(config: Config, candidate: Candidate) -> Settings:
  """Returns the settings in which a candidate differs from a config."""
  return {
    name: value
    for name, value in candidate.settings.items()
    if config_text.get_field(config, name) != value
  }


def apply(config: Config, settings: Settings) -> None:
  """Sets fields of a config; the values must have the right types."""
  for name, value in settings.items():
    section, field = name.split(".")
    setattr(getattr(config, section), field, value)
