"""Flow: from the experts of one MoE layer to those of the next.

Letters: E experts, K choices per token.
"""

from typing import Any

import numpy as np
from jaxtyping import Int

from moejax.analysis.measures import tables


def flow(
  together: Int[np.ndarray, "E E"],
  here: Int[np.ndarray, "E"],
  there: Int[np.ndarray, "E"],
  tokens: int,
  choices: int | None = 1,
) -> dict[str, Any]:
  """Returns how well a token's expert in one layer predicts that of the next MoE layer.

  `conditional[i][j]` is N_ij / N_i. `information` is the mutual information of the table
  in nats, over all pairs of a token's choices: 0 to log E. Finite counts give more than
  0 without any flow: `chance_information` is (E-K)^2 / (2 N K^2), the mean where the two
  sets of a token are independent (Miller 1955 for K=1; a share of tokens p has variance
  p (1-p) / N).

  Args:
    together: N_ij, tokens computed by i in this layer and by j in the next.
    here: tokens of each expert in this layer.
    there: tokens of each expert in the next.
    tokens: N, all tokens.
    choices: K, in both layers; None if a token may have any number: then chance is that
      for K=1 and as many tokens as there are pairs.
  """
  count = max(int(together.sum()), 1)
  free = 1
  for load in (here, there):
    free *= max(int(np.count_nonzero(load)) - (choices or 1), 0)
  information = tables.mutual_information(together)
  return {
    "conditional": (together / np.maximum(here, 1)[:, None]).tolist(),
    "lift": tables.lift(together, here, there, tokens).tolist(),
    "information": information,
    "information_fraction": information / max(tables.entropy(there), 1e-30),
    "chance_information": free / (2 * count),
  }
