"""Join: several neighbouring experts become one wider expert, the inverse of a split.

m experts of width F become one of width m F that holds all their neurons, with the mean
of their router rows; K becomes K/m. The result is exact if every token chose all m of
them or none, as after a split without training since.
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
  DROP,
  EQUAL,
  EXPERTS,
  OUTPUTS,
  Choice,
  Kind,
  Layer,
  Operation,
  Source,
  flat,
  is_close,
)
from moejax.surgery.scores import equal_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Join(Operation):
  """Joins every m neighbouring experts into one of m times the width."""

  name = "join"
  summary = "wider experts: neighbours become one, the inverse of split"

  pieces: int = option(2, "m: experts that become one", count(2, 1024, "at most E"))

  def check(self, old: Config) -> None:
    m, experts = self.pieces, old.moe.fine_experts
    selected = make_router(old.moe).selected(experts, old.moe.fine_selected)
    if experts % m or selected % m:
      raise UserError(
        f"--pieces={m} must divide the {experts} experts and the {selected} choices of a "
        "token."
      )
    equal_groups(old.moe, experts // m, f"--pieces={m}")

  def new_config(self, old: Config, asked: Config) -> Config:
    new = copy.deepcopy(asked)
    if old.moe.segments % self.pieces:
      new.moe = flat(new.moe)
      new.moe.num_experts //= self.pieces
      new.moe.num_selected = max(new.moe.num_selected // self.pieces, 1)
      new.moe.hidden *= self.pieces
      return new
    new.moe.segments //= self.pieces
    new.moe.shared_hidden = old.moe.shared_width
    return new

  def choose(self, source: Source) -> dict[int, Choice]:
    m = self.pieces
    return {
      number: Choice(
        parents=[tuple(range(e, e + m)) for e in range(0, layer.old.fine_experts, m)]
      )
      for number, layer in source.layers.items()
    }

  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    x, m = layer.arrays[name], self.pieces
    axis = layer.axis(name)
    if axis is None:
      return x
    hidden = layer.axis(name, "hidden")
    shape = x.shape[:axis] + (-1, m) + x.shape[axis + 1 :]
    parts = np.asarray(x, np.float32).reshape(shape)
    if not name.startswith(EXPERTS):
      return (
        parts.mean(axis + 1) if layer.kind is Kind.VALUE else tied(parts, layer, axis + 1)
      )
    if hidden is None:
      # An output bias: those of the parts add up.
      out = parts.sum(1) if layer.kind is Kind.VALUE else parts.mean(1)
    else:
      # [E, m, .., F, ..] -> [E, .., m F, ..]
      out = np.moveaxis(parts, 1, hidden)
      sizes = out.shape[:hidden] + (-1,) + out.shape[hidden + 2 :]
      out = out.reshape(sizes)
    return layer.scaled(out, layer.choice.scale) if name in OUTPUTS else out

  def scale(self, gates: Gates, choice: Choice) -> float:
    if gates.before is None or gates.after is None:
      return 1.0
    return float(gates.before.sum() / (self.pieces * gates.after.sum()))

  def expected(self, gates: Gates, choice: Choice) -> str:
    if gates.before is None or gates.after is None:
      return DROP
    after = np.repeat(gates.after * choice.scale, self.pieces, axis=1)
    return EQUAL if is_close(after, gates.before) else DROP


def tied(
  parts: Shaped[np.ndarray, "..."], layer: Layer, axis: int
) -> Shaped[np.ndarray, "..."]:
  """Returns the moments of one parameter that replaces several, along an axis.

  Its gradient is the sum of theirs. Second moments are combined as if all gradients had
  the same sign, which is exact for copies.
  """
  if layer.kind is Kind.SQUARE:
    return np.asarray(np.square(np.sqrt(np.asarray(parts, np.float32)).sum(axis)))
  return np.asarray(np.asarray(parts, np.float32).sum(axis))
