"""Saturation: agreement of a checkpoint's choices with those of a later one.

Letters: E experts, K choices per token.
Source: OLMoE, arXiv:2409.02060, section 5.1: mean over tokens of |E_t(x) & E_T(x)| / K.
"""

from typing import Any

import numpy as np
from jaxtyping import Int


def saturation(
  both: int,
  load: Int[np.ndarray, "E"],
  later: Int[np.ndarray, "E"],
  tokens: int,
  same_first: int | None,
) -> dict[str, Any]:
  """Returns the share of a token's experts that both checkpoints choose: 0 to 1.

  `chance` is that of two independent routers with these loads: both choose an expert with
  the product of its rates, sum_e r_e r'_e / K. It is K/E for even loads, and more for
  uneven ones.

  Args:
    both: assignments that both make.
    load: assignments of each expert.
    later: likewise, of the later checkpoint.
    tokens: number of tokens.
    same_first: tokens with the same first choice; None if tokens do not choose.
  """
  per_token = max(float(later.sum()), 1.0) / max(tokens, 1)
  rates = load / max(tokens, 1), later / max(tokens, 1)
  found = {
    "saturation": both / max(int(later.sum()), 1),
    "chance": float(np.sum(rates[0] * rates[1])) / per_token,
    "load": (load / max(int(load.sum()), 1)).tolist(),
  }
  if same_first is not None:
    found["first_choice"] = same_first / max(tokens, 1)
  return found
