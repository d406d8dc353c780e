"""Load and importance: how evenly a layer's experts are used.

Letters: E experts, K choices per token.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num


def load(
  counts: Int[np.ndarray, "E"], importance: Float[np.ndarray, "E"], tokens: int
) -> dict[str, Any]:
  """Returns how a layer's assignments and probabilities spread over its experts.

  Bounds: `max_ratio` 1 (even) to E; `entropy_fraction` 0 to 1 (even); `gini` 0 (even) to
  1 - 1/E. Even loads by chance still differ: `chance_cv` is the coefficient of variation
  of independent draws from even loads, sqrt((E - 1) / n) for n assignments.

  Args:
    counts: assignments of each expert.
    importance: sum over tokens of the router's probability (Shazeer et al. 2017,
      arXiv:1701.06538, equation 6).
    tokens: number of tokens.
  """
  share = _share(counts)
  num_experts = len(counts)
  positive = share[share > 0]
  uncertain = float(-np.sum(positive * np.log(positive)))
  return {
    "share": share.tolist(),
    "importance": (importance / max(tokens, 1)).tolist(),
    "max_ratio": float(share.max() * num_experts),
    "min_ratio": float(share.min() * num_experts),
    "cv": float(share.std() * num_experts),
    "chance_cv": float(np.sqrt((num_experts - 1) / max(int(counts.sum()), 1))),
    "entropy_fraction": uncertain / np.log(num_experts) if num_experts > 1 else 1.0,
    "gini": gini(share),
    "dead": np.flatnonzero(counts == 0).tolist(),
  }


def gini(share: Float[np.ndarray, "E"]) -> float:
  """Returns the mean absolute difference of two experts' shares, over twice the mean."""
  difference = np.abs(share[:, None] - share[None, :]).mean()
  return float(difference / max(2 * share.mean(), 1e-30))


def by_rank(counts: Int[np.ndarray, "K E"]) -> list[list[float]]:
  """Returns the experts' shares of the first choices, of the second ones, and so on."""
  return [_share(row).tolist() for row in counts]


def _share(counts: Num[np.ndarray, "E"]) -> Float[np.ndarray, "E"]:
  return counts / max(counts.sum(), 1)
