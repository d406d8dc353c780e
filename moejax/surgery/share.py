"""Share: the most used experts become part of the shared expert.

Every token then visits them, with a fixed weight: by default the mean gate that the
expert had over all tokens, so that its mean contribution stays. An existing shared expert
grows by their neurons.
"""

import copy
import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped

from moejax.config import Config
from moejax.config.router import make_router
from moejax.errors import UserError
from moejax.options import Range, count, option
from moejax.surgery.operation import (
  EXPERTS,
  SHARED,
  Choice,
  Layer,
  Operation,
  Source,
  flat,
  taken,
)
from moejax.surgery.scores import best, equal_groups, in_words, refuse_below


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share(Operation):
  """Makes the most used experts of every layer shared."""

  name = "share"
  summary = "the most used experts become shared, so that every token visits them"

  number: int = option(1, "experts that become shared", count(1, 1024, "fewer than E"))
  gate: float = option(
    0.0,
    "weight of their outputs; 0 is each one's mean gate over all tokens",
    Range(0, 1e4, why_high="outputs would be nothing but this"),
  )
  selected: Literal["less", "same"] = option(
    "less", "choices per token: fewer by those shared, at the old cost; or the same"
  )

  @property
  def reads_text(self) -> bool:
    return True

  def check(self, old: Config) -> None:
    if old.moe.expert_bias:
      raise UserError(
        "--config.moe.expert_bias=true: shared experts have no biases, so none of these "
        "experts can become one."
      )
    if old.moe.shared_gate:
      raise UserError(
        "--config.moe.shared_gate=true: the output of the shared expert is multiplied by "
        "a gate of the token, so an expert in it has no fixed weight. Use operation "
        "merge or prune for fewer experts."
      )
    router, flag = make_router(old.moe), f"--number={self.number}"
    left = old.moe.fine_experts - self.number
    equal_groups(old.moe, max(left, 0), flag)
    if router.has_table or router.fixed_slots:
      raise UserError(
        f"--config.moe.router={old.moe.router} cannot lose a single expert of a layer. "
        "Change the router first (operation reroute)."
      )
    if self.selected == "less" and router.fixed_selected is not None:
      raise UserError(
        f"--selected=less: --config.moe.router={old.moe.router} fixes the choices per "
        "token. Use --selected=same."
      )
    selected = self._selected(old)
    if selected < 1:
      raise UserError(
        f"{flag} --selected=less: a token chooses {in_words(old.moe.fine_selected)}, and "
        "none would be left to choose. Use --selected=same."
      )
    refuse_below(selected, left, flag)

  def _selected(self, old: Config) -> int:
    less = self.number if self.selected == "less" else 0
    return old.moe.fine_selected - less

  def new_config(self, old: Config, asked: Config) -> Config:
    new = copy.deepcopy(asked)
    new.moe = flat(new.moe)
    new.moe.num_experts -= self.number
    new.moe.num_selected = self._selected(old)
    new.moe.num_shared = old.moe.num_shared + self.number
    new.moe.shared_hidden = old.moe.shared_width + self.number * old.moe.fine_hidden
    self._refuse_constant(new)
    return new

  def _refuse_constant(self, new: Config) -> None:
    """Rejects gates of 1 caused by the last choice, which the config's check misses."""
    moe = new.moe
    is_last = self.selected == "less" and moe.num_selected == 1
    if moe.renormalize == "none" or moe.allow_constant_gates or not is_last:
      return
    if make_router(moe).token_choice:
      raise UserError(
        "--selected=less leaves one choice per token, and --config.moe.renormalize="
        f"{moe.renormalize} makes its gate 1, which leaves the router without a "
        "gradient. Use --selected=same, or --config.moe.renormalize=none."
      )

  def choose(self, source: Source) -> dict[int, Choice]:
    found = {}
    for number, layer in source.layers.items():
      sums = source.measured.sums[number]
      groups = make_router(layer.old).expert_groups
      # Equally many of each group of the router.
      shared = best(sums["load"], self.number, groups)
      rest = [e for e in range(layer.old.fine_experts) if e not in shared]
      mean = sums["gate"][list(shared)] / max(float(sums["tokens"]), 1.0)
      gates = [self.gate or float(g) for g in mean]
      found[number] = Choice(
        parents=[(e,) for e in rest], shared=shared, shared_gates=tuple(gates)
      )
    return found

  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    if not name.startswith(SHARED):
      return taken(name, layer)
    below = name.removeprefix(SHARED)
    hidden = layer.axis(name, "hidden")
    assert hidden is not None
    experts = layer.arrays[f"{EXPERTS}{below}"]
    parts: list[Float[np.ndarray, "..."]] = []
    if name in layer.arrays:
      parts.append(layer.arrays[name])
    for expert, gate in zip(layer.choice.shared, layer.choice.shared_gates, strict=True):
      own = experts[expert]
      parts.append(layer.scaled(own, gate) if below == "w_out" else own)
    return np.concatenate(parts, axis=hidden)
