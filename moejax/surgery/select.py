"""Select: changes the number of choices per token; nothing else changes.

Gates that are renormalised over the choices still sum to 1; raw gates sum to more or less
than before, which --scale_out makes up for on average. Either way a token loses experts
or gets new ones, so performance is expected to drop until the model is trained.
"""

import copy
import dataclasses

import numpy as np
from jaxtyping import Shaped

from moejax.config import Config
from moejax.config.router import make_router
from moejax.errors import UserError
from moejax.options import count, option
from moejax.surgery.gates import Gates
from moejax.surgery.operation import (
  CLOSE,
  DROP,
  EQUAL,
  Choice,
  Layer,
  Operation,
  Source,
  is_close,
  taken,
)
from moejax.surgery.scores import in_words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Select(Operation):
  """Changes the number of experts that a token chooses."""

  name = "select"
  summary = "another number of choices per token"

  num_selected: int = option(
    0, "K, in whole experts before segmentation", count(1, 65_536, "at most E")
  )
  scale_out: bool = option(
    False, "scale outputs so that gates sum to what they summed to on random tokens"
  )

  def check(self, old: Config) -> None:
    if not self.num_selected:
      raise UserError("--num_selected=K is missing: give the choices per token.")
    router = make_router(old.moe)
    if router.selected(old.moe.fine_experts, self.num_selected) != self.num_selected or (
      router.fixed_selected not in (None, self.num_selected)
    ):
      raise UserError(
        f"--num_selected={self.num_selected}: --config.moe.router={old.moe.router} fixes "
        "the choices per token. Change the router first (operation reroute), for "
        "example to top_k."
      )
    if self.num_selected > (experts := old.moe.num_experts):
      raise UserError(
        f"--num_selected={self.num_selected} is more than the {in_words(experts)} that "
        f"there {'is' if experts == 1 else 'are'}. Give at most {experts}."
      )

  def new_config(self, old: Config, asked: Config) -> Config:
    new = copy.deepcopy(asked)
    new.moe.num_selected = self.num_selected
    return new

  def choose(self, source: Source) -> dict[int, Choice]:
    return {n: same_experts(layer) for n, layer in source.layers.items()}

  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    return taken(name, layer)

  def scale(self, gates: Gates, choice: Choice) -> float:
    return ratio(gates) if self.scale_out else 1.0

  def expected(self, gates: Gates, choice: Choice) -> str:
    return by_choices(gates, choice)


def same_experts(layer: Layer) -> Choice:
  """Returns the choice in which every expert stays in its place."""
  return Choice(parents=[(e,) for e in range(layer.old.fine_experts)])


def ratio(gates: Gates) -> float:
  """Returns the sum of all gates before, divided by the sum after; 1 if unknown."""
  if gates.before is None or gates.after is None:
    return 1.0
  return float(gates.before.sum() / gates.after.sum())


def by_choices(gates: Gates, choice: Choice) -> str:
  """Returns what is expected of the loss if every expert stays in its place.

  It is close only if each token chooses the same experts as before.
  """
  if gates.before is None or gates.after is None:
    return DROP
  if is_close(gates.after * choice.scale, gates.before):
    return EQUAL
  same = np.array_equal(gates.after > 0, gates.before > 0)
  return CLOSE if same else DROP
