"""Co-activation: which experts compute the same tokens.

Letters: E experts, K choices per token.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

from moejax.analysis.measures import subsets, tables


def coactivation(
  pairs: Int[np.ndarray, "E E"], tokens: int, choices: int | None, *, top: int = 10
) -> dict[str, Any]:
  """Returns how often two experts compute one token, over all pairs of its choices.

  `conditional[i][j]` is N_ij / N_i, the probability of j given i: 0 to 1. `lift[i][j]` is
  N_ij N / (N_i N_j): 1 if i and j were chosen independently. A token cannot choose an
  expert twice, so K choices give less by chance: (K-1) E / (K (E-1)) at even loads, and
  1 for an expert that every token has. `over_chance[i][j]` is N_ij over its value for
  random sets of K distinct experts with the same loads (`subsets.together`). (OLMoE,
  arXiv:2409.02060, section 5.2, whose code counts only choices of neighbouring rank.)

  Args:
    pairs: N_ij, tokens computed by both; the diagonal is N_i.
    tokens: N, all tokens.
    choices: K; None if a token may have any number: then a lift of 1 is chance.
    top: number of pairs listed, those of highest z = (N_ij - expected) / sqrt(expected).
  """
  load = np.diag(pairs)
  num_experts = len(load)
  lift = tables.lift(pairs, load, load, tokens)
  apart = ~np.eye(num_experts, dtype=bool)
  conditional = np.where(apart, pairs / np.maximum(load, 1)[:, None], 0.0)
  expected = (
    load[:, None].astype(np.float64) * load[None, :] / max(tokens, 1)
    if choices is None
    else subsets.together(load, tokens, choices)
  )
  over = np.divide(pairs, expected, out=np.zeros(pairs.shape), where=expected > 0)
  z = (pairs - expected) / np.sqrt(np.maximum(expected, 1.0))
  upper = np.argwhere(np.triu(apart))
  order = np.argsort(-z[upper[:, 0], upper[:, 1]], kind="stable")[:top]
  return {
    "conditional": conditional.tolist(),
    "lift": np.where(apart, lift, 0.0).tolist(),
    "over_chance": np.where(apart, over, 0.0).tolist(),
    "top_pairs": [
      {
        "experts": [int(i), int(j)],
        "tokens": int(pairs[i, j]),
        "lift": float(lift[i, j]),
        "over_chance": float(over[i, j]),
        "z": float(z[i, j]),
      }
      for i, j in upper[order]
      if pairs[i, j]
    ],
  }
