"""Published scaling laws of sparse and dense Transformers.

    from moejax.sweep.laws import published

    published.Ludziejewski().predict(N=990e6, D=17e9, E=8)   # 2.529
    published.Ludziejewski().optimum(1e20, E=8)              # N 989M, D 16.9B
    published.Ling().predict(C=1e22, A=0.031, G=12)          # 7.24, not a loss

No two of them define N, C, D, E and G in the same way; read `definitions` before
comparing. If a docstring says "not checked", the statement was not confirmed against the
paper or by recomputing one of its numbers. Losses are nats per token of the paper's own
data and tokenizer, so constants do not carry over; exponents and orderings might.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from moejax.errors import UserError, did_you_mean
from moejax.sweep.laws.law import (
  Law,
  OutsideFittedRange,
  Span,
  effective_experts,
  spans,
)
from moejax.sweep.laws.leverage import Ling

__all__ = [
  "LAWS",
  "Abnar",
  "Chinchilla",
  "Clark",
  "Krajewski",
  "Law",
  "Ling",
  "Ludziejewski",
  "OutsideFittedRange",
  "PowerLaw",
  "by_name",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerLaw(Law):
  """L = l_inf + a C^-alpha: loss over compute along one family of models.

  The defaults are not a published fit: l_inf depends on the evaluation, so it is stored
  with the evaluation's name.
  """

  l_inf: float = 0.0
  """Irreducible loss, whatever the compute."""
  a: float = 1.0
  alpha: float = 0.1
  evaluation: str = ""
  """Name of the evaluation that the losses, and so `l_inf`, belong to."""

  definitions: ClassVar[Mapping[str, str]] = {"C": "training FLOPs, however counted"}
  positive: ClassVar[frozenset[str]] = frozenset({"l_inf", "a", "alpha"})
  starts: ClassVar[Mapping[str, tuple[float, ...]]] = {
    "l_inf": (0.1, 0.5, 1.0, 1.5, 2.0, 3.0),
    "a": (1.0, 10.0, 1e2, 1e3, 1e5, 1e8),
    "alpha": (0.03, 0.1, 0.2, 0.35, 0.5),
  }

  def formula(self, *, C: Any) -> Any:
    return self.l_inf + self.a * C ** (-self.alpha)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chinchilla(Law):
  """L = e + a N^-alpha + b D^-beta, for dense models.

  Hoffmann et al., arXiv:2203.15556, approach 3. Besiroglu et al., arXiv:2404.10102, could
  not reproduce these constants from the paper's own plots; use the form, not the values.
  """

  e: float = 1.69
  a: float = 406.4
  alpha: float = 0.34
  b: float = 410.7
  beta: float = 0.28

  source: ClassVar[str] = "arXiv:2203.15556, approach 3"
  definitions: ClassVar[Mapping[str, str]] = {
    "N": "parameters",
    "D": "training tokens",
  }
  positive: ClassVar[frozenset[str]] = frozenset({"e", "a", "alpha", "b", "beta"})
  starts: ClassVar[Mapping[str, tuple[float, ...]]] = {
    "e": (0.3, 1.0, 1.7),
    "a": (10.0, 1e2, 1e3, 1e4),
    "alpha": (0.15, 0.35, 0.6),
    "b": (10.0, 1e2, 1e3, 1e4),
    "beta": (0.15, 0.35, 0.6),
  }

  def formula(self, *, N: Any, D: Any) -> Any:
    return self.e + self.a * N ** (-self.alpha) + self.b * D ** (-self.beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clark(Law):
  """log10 L = a log10 N + b log10 E^ + c log10 N log10 E^ + d, at 130B tokens.

  Clark et al., arXiv:2202.01169, equation 1 and table 3. The paper does not state the
  base of the logarithms. Base 10 reproduces its dense law, (3.568e13/N)^0.078: 2.285 vs
  2.265 at N = 1e9 and E = 1; base e gives 0.58. D is not an input.
  """

  a: float = -0.082
  b: float = -0.108
  c: float = 0.009
  d: float = 1.104
  e_start: float = 1.847
  e_max: float = 314.478
  ranges: Mapping[str, Span] = spans(N=(15e6, 1.3e9), E=(1, 512))
  """E from the paper; the greatest N not checked."""

  source: ClassVar[str] = "arXiv:2202.01169, equation 1, table 3, S-BASE"
  definitions: ClassVar[Mapping[str, str]] = {
    "N": "parameters of the dense model that one expert per MoE layer makes",
    "E": "experts of an MoE layer; K = 1",
  }
  positive: ClassVar[frozenset[str]] = frozenset({"e_start", "e_max"})
  starts: ClassVar[Mapping[str, tuple[float, ...]]] = {
    "a": (-0.15, -0.08, -0.03),
    "b": (-0.2, -0.1, 0.0),
    "c": (0.0, 0.01),
    "d": (0.3, 0.7, 1.1, 1.5),
    "e_start": (1.1, 2.0, 4.0),
    "e_max": (100.0, 300.0, 1000.0),
  }

  @classmethod
  def published(cls, router: str = "s_base") -> "Clark":
    """Returns table 3's row of `s_base`, `rl_r` or `hash`."""
    rows = {
      "s_base": {},
      "rl_r": dict(a=-0.083, b=-0.126, c=0.012, d=1.111, e_start=1.880, e_max=469.982),
      "hash": dict(a=-0.087, b=-0.136, c=0.012, d=1.157, e_start=4.175, e_max=477.741),
    }
    if router not in rows:
      raise UserError(f"router={router}: not in table 3. {did_you_mean(router, rows)}")
    return cls(**rows[router])

  def formula(self, *, N: Any, E: Any) -> Any:
    log_n = np.log10(N)
    log_e = np.log10(effective_experts(E, self.e_start, self.e_max))
    log_loss = self.a * log_n + self.b * log_e + self.c * log_n * log_e + self.d
    return 10**log_loss

  @property
  def cutoff(self) -> float:
    """N above which more experts raise the loss: 10^(-b/c).

    Since the table gives c to three decimals, it is uncertain by a factor of 2.5 to 5;
    the paper gives 937B for S-BASE, 85B for RL-R and 83B for HASH.
    """
    return 10 ** (-self.b / self.c)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Krajewski(Law):
  """L = c + (g / G^gamma + a) / N^alpha + b / D^beta, at expansion rate 64.

  Krajewski et al., arXiv:2402.07871, equation 9 and table 1, fitted with Huber 0.1 to an
  RMSE of 0.015. `expansion` enters only the FLOPs: the constants are for E = 64.
  """

  a: float = 18.1
  alpha: float = 0.115
  b: float = 30.8
  beta: float = 0.147
  g: float = 2.1
  gamma: float = 0.58
  c: float = 0.47
  ranges: Mapping[str, Span] = spans(N=(129e6, 3.7e9), D=(16e9, 130e9), G=(1, 16))

  source: ClassVar[str] = "arXiv:2402.07871, equation 9, table 1, E = 64"
  definitions: ClassVar[Mapping[str, str]] = {
    "N": "total parameters of the blocks, (8 E + 4) d_model^2 each; no embedding, head",
    "D": "training tokens",
    "G": "granularity d_ff / d_expert, d_ff = 4 d_model",
  }
  positive: ClassVar[frozenset[str]] = frozenset({"a", "alpha", "b", "beta", "g", "c"})
  starts: ClassVar[Mapping[str, tuple[float, ...]]] = {
    "a": (5.0, 20.0, 100.0),
    "alpha": (0.1, 0.2, 0.35),
    "b": (10.0, 30.0, 100.0),
    "beta": (0.1, 0.2, 0.35),
    "g": (0.5, 2.0, 8.0),
    "gamma": (0.3, 0.6, 1.2),
    "c": (0.2, 0.5, 1.5),
  }
  expansion: ClassVar[int] = 64
  """Total parameters of an MoE layer over those of its dense counterpart."""

  @classmethod
  def dense(cls) -> "Krajewski":
    """Returns table 1's dense row; G does not matter."""
    return cls(a=16.3, alpha=0.126, b=26.7, beta=0.127, g=0.0, c=0.47)

  def formula(self, *, N: Any, D: Any, G: Any) -> Any:
    by_size = (self.g / G**self.gamma + self.a) / N**self.alpha
    return self.c + by_size + self.b / D**self.beta

  def flops_per_token(self, n: float, **others: float) -> float:
    """Returns the paper's training FLOPs: (12 d^2 c_f + d E G c_r) blocks, d = 64 blocks.

    c_f = 6 FLOPs per parameter and token, c_r = 14 for routing. These reproduce the
    paper's table of compute-optimal models to its rounding.
    """
    width = (64 * n / (8 * self.expansion + 4)) ** (1 / 3)
    routing = 14 * width * self.expansion * others["G"]
    return (6 * 12 * width**2 + routing) * width / 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Abnar(Law):
  """L = a/N^alpha + b/D^beta + c/(1-S)^lambda + d/((1-S)^delta N^gamma) + e.

  Abnar et al., arXiv:2501.12370, equation 6 and table 3 (Huber 1e-3, L-BFGS). R2 is 99%
  on the fitted runs and 68% on held-out runs at S = 0.98: it extrapolates badly.
  """

  a: float = 16612.50
  alpha: float = 0.5962
  b: float = 5455.67
  beta: float = 0.3954
  c: float = 0.4598
  lambda_: float = -0.1666
  d: float = 17.26
  delta: float = 0.1603
  gamma: float = 0.1595
  e: float = 0.94
  ranges: Mapping[str, Span] = spans(S=(0, 0.95))
  """S = 0.98 was held out; the greatest fitted S and the ranges of N, D not checked."""

  source: ClassVar[str] = "arXiv:2501.12370, equation 6, table 3"
  definitions: ClassVar[Mapping[str, str]] = {
    "N": "total parameters (whether embeddings count: not checked)",
    "D": "training tokens",
    "S": "sparsity (E - K) / E, the fraction of experts that a token does not use",
  }
  positive: ClassVar[frozenset[str]] = frozenset(
    {"a", "alpha", "b", "beta", "c", "d", "gamma", "e"}
  )
  starts: ClassVar[Mapping[str, tuple[float, ...]]] = {
    "a": (1e2, 1e4),
    "alpha": (0.3, 0.6),
    "b": (1e2, 5e3),
    "beta": (0.3, 0.45),
    "c": (0.3, 1.0),
    "lambda_": (-0.3, -0.1),
    "d": (5.0, 30.0),
    "delta": (0.1, 0.3),
    "gamma": (0.1, 0.3),
    "e": (0.5, 1.5),
  }

  def formula(self, *, N: Any, D: Any, S: Any) -> Any:
    dense = 1 - S
    return (
      self.a / N**self.alpha
      + self.b / D**self.beta
      + self.c / dense**self.lambda_
      + self.d / (dense**self.delta * N**self.gamma)
      + self.e
    )

  def flops_per_token(self, n: float, **others: float) -> float:
    """Refuses: N and S do not determine how many of the parameters are in experts."""
    raise UserError(
      "Abnar: N and S alone do not give FLOPs per token. Pass flops_per_token=, a "
      "function of N."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ludziejewski(Law):
  """L = a E^^delta N^(alpha + gamma ln E^) + b E^^omega D^(beta + zeta ln E^) + c.

  Ludziejewski et al., arXiv:2502.05172, the joint law of dense and MoE models (equation
  and table numbers not checked), fitted with Huber 0.01 in log space. E^ is Clark's.
  Exponents alpha and beta are negative. At a fixed E it is Chinchilla's form: E = 8 gives
  21.83 N^-0.1676 + 119.91 D^-0.2338 + c.
  """

  a: float = 35.91
  alpha: float = -0.1889
  delta: float = -0.2285
  gamma: float = 0.0098
  b: float = 35.98
  beta: float = -0.1775
  omega: float = 0.5529
  zeta: float = -0.0259
  c: float = 1.3637
  e_start: float = 2.0732
  e_max: float = 290.4521
  ranges: Mapping[str, Span] = spans(N=(0, 2.7e9), E=(1, 32))
  """Greatest N from the paper (2.7B active); the least N, and D, not checked."""

  source: ClassVar[str] = "arXiv:2502.05172"
  definitions: ClassVar[Mapping[str, str]] = {
    "N": "active parameters (whether embeddings count: not checked)",
    "D": "training tokens",
    "E": "experts of a layer, one chosen; 1 is dense",
  }
  positive: ClassVar[frozenset[str]] = frozenset({"a", "b", "c", "e_start", "e_max"})
  starts: ClassVar[Mapping[str, tuple[float, ...]]] = {
    "a": (10.0, 40.0, 200.0),
    "alpha": (-0.4, -0.2),
    "delta": (-0.3, 0.0),
    "gamma": (0.0, 0.01),
    "b": (10.0, 40.0, 200.0),
    "beta": (-0.35, -0.18),
    "omega": (0.0, 0.5),
    "zeta": (-0.03, 0.0),
    "c": (0.5, 1.3, 1.8),
    "e_start": (2.0,),
    "e_max": (300.0,),
  }

  def formula(self, *, N: Any, D: Any, E: Any) -> Any:
    experts = effective_experts(E, self.e_start, self.e_max)
    log_e = np.log(experts)
    by_size = self.a * experts**self.delta * N ** (self.alpha + self.gamma * log_e)
    by_data = self.b * experts**self.omega * D ** (self.beta + self.zeta * log_e)
    return by_size + by_data + self.c

  def at_experts(self, experts: float) -> Chinchilla:
    """Returns the law at one E in Chinchilla's form."""
    hat = effective_experts(experts, self.e_start, self.e_max)
    log_e = math.log(hat)
    return Chinchilla(
      e=self.c,
      a=self.a * hat**self.delta,
      alpha=-(self.alpha + self.gamma * log_e),
      b=self.b * hat**self.omega,
      beta=-(self.beta + self.zeta * log_e),
      ranges={k: v for k, v in self.ranges.items() if k != "E"},
    )

  @staticmethod
  def learning_rate(active: float, experts: float) -> float:
    """Returns the paper's peak learning rate: exp(8.39 - 0.81 ln N - 0.25 ln E)."""
    return math.exp(8.39 - 0.81 * math.log(active) - 0.25 * math.log(experts))


LAWS: Mapping[str, type[Law]] = {
  "power": PowerLaw,
  "chinchilla": Chinchilla,
  "clark": Clark,
  "krajewski": Krajewski,
  "abnar": Abnar,
  "ludziejewski": Ludziejewski,
  "ling": Ling,
}


def by_name(name: str) -> type[Law]:
  """Returns the class of a law.

  Raises:
    UserError: there is no law of that name.
  """
  if name not in LAWS:
    raise UserError(f"--law={name}: there is no such law. {did_you_mean(name, LAWS)}")
  return LAWS[name]
