"""Clone: every expert becomes several equal ones, in the middle of training.

E experts become m E; router rows are copied with their experts. With K fixed, the copies
share their original's tokens and drift apart in training (expert upcycling,
arXiv:2604.19835). With --selected=all a token chooses every copy of its experts, so the
function stays the same, at m times the cost.

Either all experts get equally many copies, or each gets at least one and the rest are
given out in proportion to a measure, by largest remainders: tokens (load), gate-weighted
output norm (reap), or the norm of the loss's gradient, similar to the paper's utility.
"""

import copy
import dataclasses
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
  flat,
  is_close,
  set_copies,
  summed_over_copies,
  taken,
)
from moejax.surgery.scores import summed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clone(Operation):
  """Makes m E experts from E: copies, with copies of their router rows."""

  name = "clone"
  summary = "more experts in the middle of training: copies of existing ones"

  factor: int = option(
    2,
    "m: E experts become m E",
    count(2, 1024, "a separate copy for every token makes no sense"),
  )
  by: Literal["uniform", "load", "reap", "gradient"] = option(
    "uniform",
    "which experts get copies: all equally, or more for a higher load, gate-weighted "
    "output norm or gradient",
  )
  selected: Literal["same", "all"] = option(
    "same", "choices per token: K as before, or m K, every copy, which changes nothing"
  )
  scale_out: bool = option(
    False, "scale outputs by what gates lose to the copies; exact for K=1 and softmax"
  )

  @property
  def reads_text(self) -> bool:
    return self.by != "uniform"

  def check(self, old: Config) -> None:
    router = make_router(old.moe)
    if router.fixed_slots:
      raise UserError(
        f"--config.moe.router={old.moe.router} has learned slots, as many as its experts "
        "need. Change the router first (operation reroute)."
      )
    if self.selected == "all" and router.fixed_selected is not None:
      raise UserError(
        f"--selected=all: --config.moe.router={old.moe.router} fixes the choices per "
        "token. Change the router first (operation reroute), for example to top_k."
      )
    if self.selected == "all" and self.by != "uniform":
      raise UserError(
        f"--selected=all with --by={self.by}: experts with fewer copies would be chosen "
        "together with copies of others. Use --by=uniform."
      )

  def new_config(self, old: Config, asked: Config) -> Config:
    new = copy.deepcopy(asked)
    new.moe = flat(asked.moe)
    new.moe.num_experts = old.moe.fine_experts * self.factor
    if self.selected == "all":
      new.moe.num_selected = old.moe.fine_selected * self.factor
      set_copies(new.moe, self.factor)
    return new

  def choose(self, source: Source) -> dict[int, Choice]:
    utility = {}
    if self.by != "uniform":
      utility = self._utility(source)
      if source.same_in_all:
        utility = summed(utility)
    found = {}
    for number, layer in source.layers.items():
      experts = layer.old.fine_experts
      own = utility.get(number, np.ones(experts))
      copies = copies_of(own, experts * self.factor)
      parents = [(e,) for e in range(experts) for _ in range(copies[e])]
      found[number] = Choice(parents=parents)
    return found

  def _utility(self, source: Source) -> dict[int, Float[np.ndarray, "E"]]:
    """Returns the utility of each expert, by layer."""
    if self.by == "gradient":
      return {n: np.sqrt(g) for n, g in source.measured.gradients().items()}
    name = "load" if self.by == "load" else "gated_norm"
    return {n: source.measured.sums[n][name] for n in source.layers}

  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    return taken(name, layer)

  def scale(self, gates: Gates, choice: Choice) -> float:
    wanted = self.scale_out or self.selected == "all"
    if not wanted or gates.before is None or gates.after is None:
      return 1.0
    return float(gates.before.sum() / gates.after.sum())

  def expected(self, gates: Gates, choice: Choice) -> str:
    if gates.before is None or gates.after is None:
      return DROP
    after = summed_over_copies(gates.after, choice, gates.before.shape[1])
    return EQUAL if is_close(after * choice.scale, gates.before) else DROP


def copies_of(utility: Float[np.ndarray, "E"], total: int) -> list[int]:
  """Returns how many copies each expert gets: at least one, and `total` in all.

  Copies beyond the first are in proportion to utility, by largest remainders.
  """
  spare = total - len(utility)
  weights = np.maximum(np.asarray(utility, np.float64), 0.0)
  if not weights.sum():
    weights = np.ones(len(utility))
  wanted = spare * weights / weights.sum()
  # The small term keeps equal utilities equal despite rounding.
  copies = np.floor(wanted + 1e-9).astype(int)
  rest = np.argsort(-(wanted - copies), kind="stable")[: spare - copies.sum()]
  copies[rest] += 1
  return (copies + 1).tolist()
