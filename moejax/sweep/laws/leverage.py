"""The law of efficiency leverage: how many FLOPs sparsity saves at equal loss."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from moejax.sweep.laws.law import Law, Span, effective_experts, spans


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ling(Law):
  """EL = A^^(alpha + gamma (log2 G)^2 + beta log2 G), alpha = a + d log10 C.

  Tian et al. (Ling), arXiv:2507.17702. The efficiency leverage EL is the FLOPs of a dense
  model over those of the MoE at equal loss. A^ saturates like Clark's E^, with A itself
  instead of E - 1. The paper does not state the bases. Only log2 for G and log10 for C
  agree with its text: the best G of 8 to 12 is 2^(-beta / (2 gamma)) = 11.3, and EL is
  7.24 at C = 1e22, A = 3.1%, G = 12 ("more than 7").
  """

  a: float = 1.23
  d: float = -7.61e-2
  gamma: float = 1.67e-2
  beta: float = -1.17e-1
  a_start: float = 1.63e-2
  a_max: float = 5.28e16
  ranges: Mapping[str, Span] = spans(A=(0, 1))
  """The fitted ranges of C and G: not checked."""

  source: ClassVar[str] = "arXiv:2507.17702, equation 13"
  output: ClassVar[str] = "leverage"
  definitions: ClassVar[Mapping[str, str]] = {
    "C": "training FLOPs of the MoE, without embedding and head",
    "A": "activation ratio (K + shared) / (E + shared), in experts",
    "G": "granularity 2 d_model / d_expert",
  }
  positive: ClassVar[frozenset[str]] = frozenset({"a_start", "a_max"})
  starts: ClassVar[Mapping[str, tuple[float, ...]]] = {
    "a": (0.5, 1.2, 2.0),
    "d": (-0.1, -0.05),
    "gamma": (0.01, 0.03),
    "beta": (-0.2, -0.1),
    "a_start": (0.01, 0.03),
    "a_max": (1e16,),
  }

  def formula(self, *, C: Any, A: Any, G: Any) -> Any:
    log_g = np.log2(G)
    exponent = self.a + self.d * np.log10(C) + self.gamma * log_g**2 + self.beta * log_g
    return effective_experts(A + 1, self.a_start, self.a_max) ** exponent

  @property
  def best_granularity(self) -> float:
    """G of the greatest leverage, which depends on neither C nor A."""
    return 2 ** (-self.beta / (2 * self.gamma))

  @staticmethod
  def allocation(budget: float, *, dense: bool = False) -> tuple[float, float]:
    """Returns the paper's compute-optimal (M, D) with M * D = budget.

    M is training FLOPs per token without embedding and head, D training tokens.
    """
    if dense:
      return 0.0655 * budget**0.5422, 15.2582 * budget**0.4578
    return 0.1915 * budget**0.5095, 5.2232 * budget**0.4905

  @staticmethod
  def learning_rate(budget: float) -> float:
    """Returns the peak learning rate at a budget of C FLOPs: 1.1576 C^-0.1529."""
    return 1.1576 * budget**-0.1529

  @staticmethod
  def batch_tokens(budget: float) -> float:
    """Returns the tokens per batch at a budget of C FLOPs: 0.0694 C^0.3644."""
    return 0.0694 * budget**0.3644
