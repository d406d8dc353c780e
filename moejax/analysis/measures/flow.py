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
) -> dict[str, Any]:
  """Returns how well a token's expert in one layer tells that of the next MoE layer.

  `conditional[i][j]` is N_ij / N_i. `information` is the mutual information of the table
  in nats, over all pairs of a token's choices: 0 to log E. Finite counts give more than
  0 without any flow: `chance_information` is (E-1)^2 / (2 n), the mean under independence
  for n counts (Miller 1955). With K > 1 the K^2 pairs of one token are not independent
  and chance gives somewhat more.

  Args:
    together: N_ij, tokens computed by i in this layer and by j in the next.
    here: tokens of each expert in this layer.
    there: tokens of each expert in the next.
    tokens: N, all tokens.
  """
  count = max(int(together.sum()), 1)
  free = (np.count_nonzero(here) - 1) * (np.count_nonzero(there) - 1)
  information = tables.mutual_information(together)
  return {
    "conditional": (together / np.maximum(here, 1)[:, None]).tolist(),
    "lift": tables.lift(together, here, there, tokens).tolist(),
    "information": information,
    "information_fraction": information / max(tables.entropy(there), 1e-30),
    "chance_information": max(free, 0) / (2 * count),
  }
