"""Prune: removes experts, equally many from each layer, with their router rows.

The experts with the lowest importance are removed. Importances:

  load       tokens that chose the expert
  reap       mean over these of gate * norm of the expert's output (REAP,
             arXiv:2510.13999, section 4), gates divided by the token's sum of gates, as
             its code does by option, with a lower loss
  norm       the norm of the output, summed over these tokens (EAN)
  mean_norm  the same, averaged (MAN, arXiv:2606.15716)
  weights    -mean|w| / rms(w) over the expert's matrices, without any text (AIMER,
             arXiv:2603.18492; its released code drops the highest ratio)
  loss       how much the loss rises without this expert alone, measured
  random     by --seed, as a control that the others must beat
  subset     the subset that best reproduces the layer's output, found by trying all
             (NAEE, arXiv:2402.14800); for few experts

If a table gives the experts, all layers drop the same ones, by the sum of importances.

Under raw softmax, the pruned experts' gates go to the remaining ones. With --denominator
the logits of pruned experts stay in the softmax (`moe.pruned_rows`), and only tokens that
had chosen them change.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped

from moejax.config import Config
from moejax.config.router import make_router
from moejax.errors import UserError
from moejax.options import count, option
from moejax.surgery.gates import Gates
from moejax.surgery.operation import (
  CLOSE,
  DROP,
  EQUAL,
  EXPERTS,
  ROUTER,
  Choice,
  Layer,
  Operation,
  Source,
  flat,
  is_close,
  taken,
)
from moejax.surgery.scores import best, equal_groups, refuse_below, summed

PRUNED = {
  f"{ROUTER}pruned": f"{ROUTER}weight",
  f"{ROUTER}pruned_bias": f"{ROUTER}logit_bias",
}
"""Router rows without experts, and the arrays that they come from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune(Operation):
  """Removes the least important experts of every layer."""

  name = "prune"
  summary = "fewer experts: the least important ones are left out"

  experts: int = option(
    0, "E afterwards, counting segments", count(1, 2**20, "fewer than there are")
  )
  by: Literal[
    "load", "reap", "norm", "mean_norm", "weights", "loss", "subset", "random"
  ] = option(
    "reap", "importance: load, reap, norm, mean_norm, weights, loss, subset or random"
  )

  denominator: bool = option(
    False,
    "raw softmax: keep the logits of pruned experts in it, so that gates stay the same",
  )

  @property
  def reads_text(self) -> bool:
    return self.by not in ("weights", "random")

  def check(self, old: Config) -> None:
    refuse_count(old, self.experts, self.name)
    groups = equal_groups(old.moe, self.experts, f"--experts={self.experts}")
    probable = make_router(old.moe).gates_are_probabilities
    if self.denominator and not (probable and old.moe.renormalize == "none"):
      raise UserError(
        f"--denominator: --config.moe.router={old.moe.router} with renormalize="
        f"{old.moe.renormalize} has gates that do not depend on experts which are not "
        "chosen. Leave it out."
      )
    if self.by == "subset" and groups > 1:
      raise UserError(
        f"--by=subset: the router has {groups} groups, which must lose equally many. "
        "Use --by=reap."
      )
    if self.by in ("loss", "subset") and make_router(old.moe).has_table:
      raise UserError(
        f"--by={self.by}: --config.moe.router={old.moe.router} does not choose by "
        "logits, so nothing can be tried. Use --by=load."
      )

  def new_config(self, old: Config, asked: Config) -> Config:
    new = copy.deepcopy(asked)
    new.moe = flat(new.moe)
    new.moe.num_experts = self.experts
    if self.denominator:
      new.moe.pruned_rows += old.moe.fine_experts - self.experts
    return new

  def choose(self, source: Source) -> dict[int, Choice]:
    if self.by == "subset":
      kept = source.measured.best_subsets(self.experts)
    else:
      scores = self._scores(source)
      if source.same_in_all:
        scores = summed(scores)
      groups = {n: make_router(la.old).expert_groups for n, la in source.layers.items()}
      kept = {n: best(own, self.experts, groups[n]) for n, own in scores.items()}
    unused = dict.fromkeys(source.layers, False)
    if self.reads_text:
      sums = source.measured.sums
      for number in source.layers:
        left_out = np.setdiff1d(np.arange(len(sums[number]["load"])), kept[number])
        unused[number] = not sums[number]["load"][left_out].sum()
    return {
      n: Choice(parents=[(e,) for e in kept[n]], exact=unused[n]) for n in source.layers
    }

  def _scores(self, source: Source) -> dict[int, Float[np.ndarray, "E"]]:
    """Returns importances by layer."""
    if self.by == "loss":
      removal = source.measured.removal()
      return {n: removal[n] for n in source.layers}
    if self.by == "random":
      return {
        n: la.random().random(la.old.fine_experts) for n, la in source.layers.items()
      }
    if self.by == "weights":
      return {n: -concentration(layer) for n, layer in source.layers.items()}
    sums = source.measured.sums
    return {n: importance(sums[n], self.by) for n in source.layers}

  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    if not (self.denominator and name in PRUNED):
      return taken(name, layer)
    rows = layer.arrays[PRUNED[name]]
    gone = np.setdiff1d(np.arange(rows.shape[-1]), layer.choice.sources)
    before = [layer.arrays[name]] if name in layer.arrays else []
    return np.concatenate([*before, np.take(rows, gone, -1)], -1)

  def expected(self, gates: Gates, choice: Choice) -> str:
    if gates.before is None or gates.after is None or not choice.exact:
      return DROP
    kept = gates.before[:, choice.sources]
    # Random tokens may choose experts that the text does not.
    there = np.isclose(kept.sum(1), gates.before.sum(1))
    if not there.any():
      return CLOSE
    after, kept = gates.after[there], kept[there]
    if is_close(after, kept):
      return EQUAL
    return CLOSE if np.array_equal(after > 0, kept > 0) else DROP


def importance(
  sums: Mapping[str, Float[np.ndarray, "..."]], by: str
) -> Float[np.ndarray, "E"]:
  """Returns the importance of a layer's experts, from sums over a text."""
  load = np.maximum(sums["load"], 1.0)
  match by:
    case "load":
      return sums["load"]
    case "reap":
      return sums["gated_norm"] / load
    case "norm":
      return sums["norm"]
    case _:
      return sums["norm"] / load


def refuse_count(old: Config, experts: int, what: str) -> None:
  """Rejects a number of experts that is missing, not lower than before, or below K.

  Raises:
    UserError: it is; the message names the flag.
  """
  flag, there = f"--experts={experts}", old.moe.fine_experts
  if not experts:
    raise UserError(
      f"--experts=N is missing: give the number of experts that {what} leaves."
    )
  router = make_router(old.moe)
  if router.fixed_slots:
    raise UserError(
      f"--config.moe.router={old.moe.router} has learned slots, as many as its "
      f"{there} experts need, so experts cannot be left out. Change the router first "
      "(operation reroute)."
    )
  if experts >= there:
    raise UserError(f"{flag} is not fewer than the {there} existing experts.")
  selected = router.selected(experts, old.moe.fine_selected)
  refuse_below(selected, experts, flag)


def concentration(layer: Layer) -> Float[np.ndarray, "E"]:
  """Returns mean|w| / rms(w) of each expert, over all its matrices."""
  absolute = square = size = 0.0
  for name in layer.arrays:
    if name.startswith(EXPERTS) and not name.endswith("bias"):
      x = np.asarray(layer.arrays[name], np.float64)
      absolute = absolute + np.abs(x).sum(axis=(1, 2))
      square = square + np.square(x).sum(axis=(1, 2))
      size += x[0].size
  return np.asarray(absolute / size / np.sqrt(np.maximum(square / size, 1e-300)))
