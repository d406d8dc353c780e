"""Co-activation: which experts compute the same tokens.

Letters: E experts, K choices per token.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

from moejax.analysis.measures import tables


def coactivation(
  pairs: Int[np.ndarray, "E E"], tokens: int, *, top: int = 10
) -> dict[str, Any]:
  """Returns how often two experts compute one token, over all pairs of its choices.

  `conditional[i][j]` is N_ij / N_i, the probability of j given i: 0 to 1. `lift[i][j]` is
  N_ij N / (N_i N_j): 1 if i and j were chosen independently. K distinct choices from E
  equal experts give (K-1) E / (K (E-1)) and not 1, since a token cannot choose an expert
  twice: `chance_lift`. (OLMoE, arXiv:2409.02060, section 5.3, whose code counts only
  choices of neighbouring rank.)

  Args:
    pairs: N_ij, tokens computed by both; the diagonal is N_i.
    tokens: N, all tokens.
    top: pairs listed, of highest z = (N_ij - expected) / sqrt(expected).
  """
  load = np.diag(pairs)
  num_experts = len(load)
  lift = tables.lift(pairs, load, load, tokens)
  apart = ~np.eye(num_experts, dtype=bool)
  conditional = np.where(apart, pairs / np.maximum(load, 1)[:, None], 0.0)
  choices = load.sum() / max(tokens, 1)
  chance = (choices - 1) * num_experts / max(choices * (num_experts - 1), 1e-30)
  expected = chance * load[:, None] * load[None, :] / max(tokens, 1)
  z = (pairs - expected) / np.sqrt(np.maximum(expected, 1.0))
  upper = np.argwhere(np.triu(apart))
  order = np.argsort(-z[upper[:, 0], upper[:, 1]], kind="stable")[:top]
  return {
    "conditional": conditional.tolist(),
    "lift": np.where(apart, lift, 0.0).tolist(),
    "chance_lift": float(chance),
    "top_pairs": [
      {
        "experts": [int(i), int(j)],
        "tokens": int(pairs[i, j]),
        "lift": float(lift[i, j]),
        "z": float(z[i, j]),
      }
      for i, j in upper[order]
      if pairs[i, j]
    ],
  }
