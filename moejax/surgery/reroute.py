"""Reroute: replaces the router, and keeps the arrays that fit the new one.

The flags are those of the config: --config.moe.router=sigmoid_bias and its options. An
array that both routers have in the same shape is kept (the weight of the logits always
is); others are newly initialised. Experts stay the same.
"""

import copy
import dataclasses

import numpy as np
from jaxtyping import Shaped

from moejax.config import Config
from moejax.config.router import make_router
from moejax.errors import UserError
from moejax.options import option
from moejax.surgery.gates import Gates
from moejax.surgery.operation import (
  ROUTER,
  Choice,
  Layer,
  Operation,
  Source,
  taken,
)
from moejax.surgery.select import by_choices, ratio, same_experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reroute(Operation):
  """Replaces the router."""

  name = "reroute"
  summary = "another router, which keeps the weights that it can use"
  reads = (
    *("moe.router", "moe.router_bias", "moe.*.*", "moe.num_selected"),
    # The learned slots of a router that has them, such as soft.
    *("moe.group_size", "moe.capacity_factor", "moe.eval_capacity_factor"),
    *("moe.capacity_convention", "moe.min_capacity"),
  )

  carry: bool = option(True, "keep the arrays that both routers have")
  scale_out: bool = option(
    False, "scale outputs so that gates sum to what they summed to on random tokens"
  )

  def new_config(self, old: Config, asked: Config) -> Config:
    new = copy.deepcopy(asked)
    if new.moe.router == old.moe.router and new.moe.options == old.moe.options:
      raise UserError(
        f"--config.moe.router={new.moe.router} is the run's router. Give another, or "
        "other options of it."
      )
    new.moe.options = {n: o for n, o in new.moe.options.items() if n == new.moe.router}
    fixed = make_router(new.moe).fixed_selected
    if fixed is not None and asked.moe.num_selected == old.moe.num_selected:
      new.moe.num_selected = fixed
    return new

  def choose(self, source: Source) -> dict[int, Choice]:
    return {n: same_experts(layer) for n, layer in source.layers.items()}

  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    if not name.startswith(ROUTER):
      return taken(name, layer)
    if self.carry and name in layer.arrays:
      old = layer.arrays[name]
      if old.shape == layer.shapes[name]:
        return old
    return layer.fresh(name)

  def scale(self, gates: Gates, choice: Choice) -> float:
    return ratio(gates) if self.scale_out else 1.0

  def expected(self, gates: Gates, choice: Choice) -> str:
    return by_choices(gates, choice)
