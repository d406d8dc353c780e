"""Split: every expert becomes several narrower ones, which together compute the same.

One expert of width F becomes m of width F/m: each has a part of the hidden neurons, and
the router row of the whole expert. K becomes m K, so that a token that chose the expert
chooses all its parts. If gates are shares of a whole (softmax, 1/K), each part gets part
of the gate, and `w_out` is scaled to make up for it. This is DeepSeekMoE's segmentation
(arXiv:2401.06066, section 3.1), applied to a trained model.

The parts have different outputs, so the gradients of their router rows are not 1/m of the
whole row's gradient; only their sum is equal to it. Their second moments are an
approximation.
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
  Layer,
  Operation,
  Source,
  is_close,
  set_copies,
  taken,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split(Operation):
  """Splits every expert into m of width F/m; a token chooses all parts of its experts."""

  name = "split"
  summary = "narrower experts: each becomes several that together compute the same"

  pieces: int = option(
    2, "m: of width F/m each", count(2, 1024, "an expert has few neurons")
  )

  def check(self, old: Config) -> None:
    hidden, m = old.moe.fine_hidden, self.pieces
    if hidden % m:
      near = [d for d in range(2, hidden + 1) if not hidden % d]
      raise UserError(
        f"--pieces={m} does not divide the {hidden} neurons of an expert. "
        f"Divisors are {', '.join(map(str, near[:12]))}."
      )
    router = make_router(old.moe)
    if router.fixed_selected is not None or router.mixes or router.fixed_slots:
      raise UserError(
        f"--config.moe.router={old.moe.router} cannot choose {m} parts of an expert for "
        "each that it chose. Change the router first (operation reroute), for example "
        "to top_k."
      )

  def new_config(self, old: Config, asked: Config) -> Config:
    new = copy.deepcopy(asked)
    # As segments, which keep the numbering of the whole experts readable.
    new.moe.segments = old.moe.segments * self.pieces
    new.moe.shared_hidden = old.moe.shared_width
    set_copies(new.moe, self.pieces)
    return new

  def choose(self, source: Source) -> dict[int, Choice]:
    m = self.pieces
    return {
      number: Choice(
        parents=[(e,) for e in range(layer.old.fine_experts) for _ in range(m)]
      )
      for number, layer in source.layers.items()
    }

  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    if not name.startswith(EXPERTS):
      return taken(name, layer)
    x, m = layer.arrays[name], self.pieces
    hidden = layer.axis(name, "hidden")
    if hidden is None:
      # An output bias: every part adds its share of it.
      out = layer.shared_out(np.repeat(x, m, 0), np.full(len(x) * m, float(m)), 0)
      out = layer.scaled(out, 1 / m)
    else:
      # [E, .., m F/m, ..] -> [E m, .., F/m, ..]
      shape = x.shape[:hidden] + (m, -1) + x.shape[hidden + 1 :]
      out = np.moveaxis(x.reshape(shape), hidden, 1)
      out = out.reshape(-1, *out.shape[2:])
    return layer.scaled(out, layer.choice.scale) if name in OUTPUTS else out

  def scale(self, gates: Gates, choice: Choice) -> float:
    if gates.before is None or gates.after is None:
      return 1.0
    return float(self.pieces * gates.before.sum() / gates.after.sum())

  def expected(self, gates: Gates, choice: Choice) -> str:
    if gates.before is None or gates.after is None:
      return DROP
    wanted = np.repeat(gates.before, self.pieces, axis=1)
    return EQUAL if is_close(gates.after * choice.scale, wanted) else DROP
