"""Upcycle: a dense model becomes a Mixture of Experts.

The feed-forward of every layer that the new config makes MoE becomes E experts
(Komatsuzaki et al., arXiv:2212.05055); the rest is copied. The result is set by flags of
the config: --config.moe.num_experts, num_selected, every, offset, router, segments.

  init      copy: exact copies
            noise: copies plus normal noise of std --noise
            drop: a fraction --ratio of the neurons of each copy is redrawn, from a normal
            distribution with the mean and std of what it replaces (Drop-Upcycling,
            arXiv:2502.19261, section 3); --neurons=shared draws one set for all
            matrices of an expert, as in the paper; independent draws one for each, as in
            its code, and leaves (1 - ratio)^3 of the neurons of a gated expert whole
            entries: a fraction --ratio of the entries is drawn from N(0, --noise)
            (OLMoE's script, arXiv:2409.02060)
  segments  with m > 1, each copy is cut into m experts of width F/m with equal router
            rows, so that a token chooses all of them (virtual groups of NVIDIA,
            arXiv:2410.07524, section 3.1). They scale all matrices by a root; here only
            w_out is scaled, which keeps the dense logits exactly for any activation
  scale_out  w_out is scaled to make up for gates that do not sum to 1, so that the first
            logits are the dense model's: exactly if the gates of every token have the
            same sum (renormalised, or a zero router), else on average
  dense_share  a shared expert, the whole dense feed-forward, gives this part of the
            output, and the routed experts the rest

Letters: D width, H hidden width of the dense layer, E coarse experts, m segments,
F = H/m.
"""

import copy
import dataclasses
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from moejax.config import Config
from moejax.errors import UserError
from moejax.layers.block import twin_hidden
from moejax.models.make import make_model
from moejax.options import Range, option
from moejax.surgery.gates import Gates
from moejax.surgery.operation import (
  CLOSE,
  DROP,
  EQUAL,
  EXPERTS,
  OUTPUTS,
  ROUTER,
  SHARED,
  Choice,
  Kind,
  Layer,
  Operation,
  Source,
  is_close,
)

DENSE = "feed_forward."
_PART = Range(0, 1, "a part of a whole", why_high="a part of a whole")
_NEARLY = 0.1
"""Relative deviation of sums of gates up to which the loss stays close."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycle(Operation):
  """Makes experts from dense feed-forward layers."""

  name = "upcycle"
  summary = "a dense model becomes a Mixture of Experts"
  reads = ("moe.*",)
  needs_moe = False

  init: Literal["copy", "noise", "drop", "entries"] = option(
    "copy", "experts: copies, with noise, with neurons or entries drawn anew"
  )
  noise: float = option(
    0.02, "std of noise, and of entries drawn anew", Range(0, 1e4, "0 is none")
  )
  ratio: float = option(0.5, "init=drop, entries: part that is drawn anew", _PART)
  neurons: Literal["shared", "independent"] = option(
    "shared", "init=drop: one set of neurons per expert (paper), or per matrix (code)"
  )
  router: Literal["random", "zero"] = option(
    "random", "router rows: the model's own initialisation, or zero"
  )
  router_std: float = option(
    0.0,
    "router=random: std of a normal distribution; 0 is the model's initialisation",
    Range(0, 1e4, "0 is the model's own"),
  )
  scale_out: bool = option(
    True, "scale outputs so that the first logits are the dense model's"
  )
  dense_share: float = option(
    0.0, "part of the output that a shared expert, the dense layer, gives", _PART
  )

  def check(self, old: Config) -> None:
    model = _model(old)
    if model.moe_layers:
      raise UserError(
        "upcycle: the run has MoE layers already. Use operation clone or add for more "
        "experts, split for narrower ones."
      )

  def new_config(self, old: Config, asked: Config) -> Config:
    new = copy.deepcopy(asked)
    new.moe.dense_twin = False
    if new.moe.dense_after:
      raise UserError(
        "--config.moe.dense_after=true: the run has no second feed-forward for it. "
        "Leave it out."
      )
    before, after = _model(old), _model(new)
    if not after.moe_layers:
      raise UserError(
        f"--config.moe.every={new.moe.every} --config.moe.dense_prefix="
        f"{new.moe.dense_prefix} make no layer MoE. Lower them."
      )
    sparse, dense = set(), set()
    for name, stack in after.stacks.items():
      kinds = stack.pattern.is_moe
      for index, own in enumerate(_dense_kinds(before.stacks[name])):
        (sparse if kinds[index] else dense).add(own)
    self._set_sizes(new, sparse, dense)
    return new

  def _set_sizes(
    self, new: Config, sparse: set[tuple[int, str]], dense: set[tuple[int, str]]
  ) -> None:
    """Sets the widths and activations of the layers that become MoE and of the others."""
    for kinds, what in ((sparse, "become MoE"), (dense, "stay dense")):
      if len(kinds) > 1:
        found = " and ".join(f"{width} ({name})" for width, name in sorted(kinds))
        raise UserError(
          f"The layers that {what} have hidden widths {found}, and a model has only one. "
          "Choose others with --config.moe.every, offset and dense_prefix."
        )
    (hidden, activation) = next(iter(sparse))
    if dense:
      new.model.hidden, new.model.activation = next(iter(dense))
    new.moe.hidden = hidden
    new.moe.activation = "" if activation == new.model.activation else activation
    if hidden % new.moe.segments:
      raise UserError(
        f"--config.moe.segments={new.moe.segments} does not divide the {hidden} neurons "
        "of the dense layer. Choose a divisor."
      )
    if self.dense_share:
      new.moe.num_shared = max(new.moe.num_shared, 1)
      new.moe.shared_hidden = hidden
    elif new.moe.shared_width:
      raise UserError(
        f"--config.moe.num_shared={new.moe.num_shared}: a shared expert is the dense "
        "layer, with --dense_share=0.5 or another part of the output."
      )

  def choose(self, source: Source) -> dict[int, Choice]:
    found = {}
    for number, layer in source.layers.items():
      experts = layer.new.fine_experts
      words = {"copy": "dense layer", "noise": "dense layer plus noise"}
      made = words.get(self.init, f"dense layer, {self.ratio:g} of its {self.init} anew")
      if self.init == "drop":
        made = f"dense layer, {self.ratio:g} of its neurons anew"
      found[number] = Choice(parents=[()] * experts, made=[made] * experts)
    return found

  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    if name.startswith(ROUTER):
      return self._router(name, layer)
    if name.startswith(EXPERTS):
      return self._experts(name, layer)
    if name.startswith(SHARED):
      x = layer.arrays[DENSE + name.removeprefix(SHARED)]
      # A zero gate of the shared expert is sigmoid(0).
      half = 0.5 if layer.new.shared_gate else 1.0
      if name.endswith("w_out"):
        x = layer.scaled(x, self.dense_share / half)
      return layer.weighted(x, self.dense_share)
    return layer.zeros(name)

  def _experts(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    below = name.removeprefix(EXPERTS)
    if below.endswith("bias"):
      return layer.zeros(name)
    x = layer.arrays[DENSE + below]
    m, coarse = layer.new.segments, layer.new.num_experts
    hidden = 0 if below == "w_out" else 1
    copies = np.stack([self._copy(x, e, below, hidden, layer) for e in range(coarse)])
    copies = layer.shared_out(copies, np.full(coarse, float(coarse)), 0)
    out = in_segments(layer.weighted(copies, 1 - self.dense_share), below, m)
    return layer.scaled(out, layer.choice.scale) if name in OUTPUTS else out

  def _copy(
    self, x: Shaped[np.ndarray, "..."], expert: int, name: str, hidden: int, layer: Layer
  ) -> Shaped[np.ndarray, "..."]:
    """Returns a copy of a dense matrix, changed according to `init`."""
    if self.init == "copy":
      return x
    number = ("w_in", "w_gate", "w_out").index(name)
    random = layer.random(expert, number)
    is_value = layer.kind is Kind.VALUE
    out = np.array(x, np.float32)
    if self.init == "noise":
      return out + random.normal(0.0, self.noise, x.shape) if is_value else out
    if self.init == "entries":
      where = random.random(x.shape) < self.ratio
      drawn = random.normal(0.0, self.noise, x.shape)
      return np.where(where, drawn if is_value else 0.0, out)
    size = x.shape[hidden]
    if self.neurons == "shared":
      chosen = layer.random(expert).permutation(size)
    else:
      chosen = random.permutation(size)
    chosen = chosen[: round(self.ratio * size)]
    index = (chosen,) if hidden == 0 else (slice(None), chosen)
    part = out[index]
    out[index] = random.normal(part.mean(), part.std(), part.shape) if is_value else 0.0
    return out

  def _router(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    axis = layer.axis(name)
    if layer.kind is not Kind.VALUE:
      return layer.zeros(name)
    is_weight = name == f"{ROUTER}weight"
    if is_weight and self.router == "zero":
      return layer.zeros(name)
    x = layer.fresh(name)
    if is_weight and self.router_std:
      x = layer.random(0, 9).normal(0.0, self.router_std, x.shape)
    if axis is None or layer.new.segments == 1:
      return x
    # Parts of an expert have equal rows, so that they are chosen together.
    m = layer.new.segments
    return np.repeat(np.take(x, np.arange(0, x.shape[axis], m), axis), m, axis)

  def scale(self, gates: Gates, choice: Choice) -> float:
    routed = 1.0 - self.dense_share
    if not self.scale_out or gates.after is None:
      return routed
    return routed * gates.moe.segments / float(gates.after.sum(1).mean())

  def expected(self, gates: Gates, choice: Choice) -> str:
    if gates.after is None or self.init in ("drop", "entries"):
      return DROP
    parts = gates.after.reshape(len(gates.after), -1, gates.moe.segments)
    together = is_close(parts, np.repeat(parts[..., :1], parts.shape[-1], -1))
    sums = gates.after.sum(1) * choice.scale / gates.moe.segments
    wanted = np.full_like(sums, 1.0 - self.dense_share)
    if self.init == "copy" and together and is_close(sums, wanted):
      return EQUAL
    near = np.abs(sums - wanted).mean() <= _NEARLY * max(1.0 - self.dense_share, 1e-3)
    return CLOSE if together and near else DROP


def in_segments(
  experts: Shaped[np.ndarray, "R ..."], name: str, m: int
) -> Shaped[np.ndarray, "E ..."]:
  """Returns experts cut along their hidden width: [R, .., m F, ..] to [R m, .., F, ..].

  Args:
    experts: one matrix of each expert.
    name: of the matrix; `w_out` has the hidden width first.
    m: parts of each expert.
  """
  hidden = 1 if name == "w_out" else 2
  shape = experts.shape[:hidden] + (m, -1) + experts.shape[hidden + 1 :]
  out = np.moveaxis(experts.reshape(shape), hidden, 1)
  return out.reshape(-1, *out.shape[2:])


def _model(config: Config) -> Any:
  return make_model(config.model, config.moe, vocab_size=config.model.vocab_size or 8)


def _dense_kinds(stack: Any) -> list[tuple[int, str]]:
  """Returns the hidden width and activation of every dense layer of a stack."""
  plain = (stack.config.hidden, stack.config.activation)
  twin = (twin_hidden(stack.moe), stack.moe.activation or stack.config.activation)
  return [twin if is_moe else plain for is_moe in stack.pattern.is_moe]
