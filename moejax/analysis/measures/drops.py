"""Drops: which tokens lose their experts to a full queue.

Letters: K choices per token, n kinds of token.
"""

from typing import Any

import numpy as np
from jaxtyping import Int


def drops(
  tokens: Int[np.ndarray, "n"],
  lost: Int[np.ndarray, "n"],
  dropped: Int[np.ndarray, "n"] | None,
  choices: float,
) -> dict[str, Any]:
  """Returns drop rates by kind of token: domain, frequency, or position.

  `lost` is the share of tokens that no expert computes; `dropped`, of choices without a
  slot; both 0 to 1. `error` is the standard error of `lost` if tokens were independent,
  which neighbours are not.

  Args:
    tokens: of each kind.
    lost: tokens that no expert computes.
    dropped: choices without a slot; None if tokens do not choose.
    choices: K.
  """
  count = np.maximum(tokens, 1)
  rate = lost / count
  found = {
    "tokens": tokens.tolist(),
    "lost": rate.tolist(),
    "error": np.sqrt(rate * (1 - rate) / count).tolist(),
  }
  if dropped is not None:
    found["dropped"] = (dropped / (count * max(choices, 1e-30))).tolist()
  return found
