"""Permute: experts change places, with their router rows; the function stays the same.

This helps if places map to devices: under expert parallelism, each of n devices has E/n
consecutive experts. `--by=load` spreads the load: the busiest expert goes to the device
with the least load so far that has room (the greedy scheduling rule of Graham 1969).
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped

from moejax.config import Config
from moejax.config.router import make_router
from moejax.errors import UserError
from moejax.options import count, option
from moejax.surgery.gates import Gates
from moejax.surgery.operation import (
  DROP,
  EQUAL,
  Choice,
  Layer,
  Operation,
  Source,
  is_close,
  taken,
)
from moejax.surgery.scores import summed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Permute(Operation):
  """Puts the experts of every layer into another order."""

  name = "permute"
  summary = "another order of the experts, such as one that spreads load over devices"

  by: Literal["random", "load", "order"] = option(
    "random", "at random, by --order, or so that every device has an equal load"
  )
  order: str = option("", "by=order: the old indices in their new order: 2,0,1,3")
  devices: int = option(
    1, "by=load: parts of the expert axis", count(1, 65_536, "at most the experts")
  )

  @property
  def reads_text(self) -> bool:
    return self.by == "load"

  def check(self, old: Config) -> None:
    experts, groups = old.moe.fine_experts, make_router(old.moe).expert_groups
    if bool(self.order) != (self.by == "order"):
      raise UserError(f"--order={self.order}: give it with --by=order, and only then.")
    if self.by == "order":
      self._check_order(experts, groups)
    if self.by == "load" and (experts % self.devices or self.devices == 1):
      raise UserError(
        f"--devices={self.devices}: give a number above 1 that divides the {experts} "
        "experts."
      )
    if self.by == "load" and groups > 1 and self.devices % groups:
      raise UserError(
        f"--devices={self.devices}: experts stay in their {groups} groups, so give a "
        "multiple of that."
      )

  def _check_order(self, experts: int, groups: int) -> None:
    order = self._order()
    if sorted(order) != list(range(experts)):
      raise UserError(
        f"--order={self.order}: name each of the experts 0 to {experts - 1} once."
      )
    size = experts // groups
    if any(new // size != old // size for new, old in enumerate(order)):
      raise UserError(
        f"--order={self.order} moves experts out of their group. Keep each within its "
        f"{size} places."
      )

  def _order(self) -> list[int]:
    try:
      return [int(word) for word in self.order.split(",")]
    except ValueError:
      raise UserError(
        f"--order={self.order}: give numbers separated by commas."
      ) from None

  def new_config(self, old: Config, asked: Config) -> Config:
    return copy.deepcopy(asked)

  def choose(self, source: Source) -> dict[int, Choice]:
    loads: dict[int, np.ndarray] = {}
    if self.by == "load":
      sums = source.measured.sums
      loads = {number: sums[number]["load"] for number in source.layers}
      if source.same_in_all:
        loads = summed(loads)
    found = {}
    for number, layer in source.layers.items():
      groups = make_router(layer.old).expert_groups
      if self.by == "order":
        order: Sequence[int] = self._order()
      elif self.by == "load":
        order = spread(loads[number], self.devices, groups)
      else:
        same = np.random.default_rng(source.seed)
        random = same if source.same_in_all else layer.random()
        inside = np.arange(layer.old.fine_experts).reshape(groups, -1)
        order = np.concatenate([random.permutation(row) for row in inside]).tolist()
      found[number] = Choice(parents=[(e,) for e in order])
    return found

  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    return taken(name, layer)

  def expected(self, gates: Gates, choice: Choice) -> str:
    if gates.before is None or gates.after is None:
      return EQUAL  # Slots go with their experts.
    same = is_close(gates.after, gates.before[:, choice.sources])
    return EQUAL if same else DROP


def spread(load: Float[np.ndarray, "E"], devices: int, num_groups: int = 1) -> list[int]:
  """Returns an order in which consecutive equal parts have nearly equal loads.

  Args:
    load: load of each expert.
    devices: number of parts; a multiple of `num_groups`.
    num_groups: number of groups; an expert stays in its group.
  """
  experts = len(load)
  room, size = experts // devices, experts // num_groups
  order: list[int] = []
  for group in range(num_groups):
    parts: list[list[int]] = [[] for _ in range(devices // num_groups)]
    own = np.arange(group * size, (group + 1) * size)
    for expert in own[np.argsort(-load[own], kind="stable")]:
      open_parts = [part for part in parts if len(part) < room]
      least = min(open_parts, key=lambda part: float(load[part].sum()))
      least.append(int(expert))
    order += [expert for part in parts for expert in part]
  return order
