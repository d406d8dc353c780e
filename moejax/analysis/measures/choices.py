"""Choices: how certain a router is, and how close its calls are.

Letters: E experts, K choices per token, W bins.
"""

from typing import Any

import numpy as np
from jaxtyping import Int


def certainty(
  entropy_sum: float, bins: Int[np.ndarray, "W"], tokens: int, num_experts: int
) -> dict[str, Any]:
  """Returns the entropy of a token's probabilities over experts.

  Bounds of `entropy`: 0 (one expert has all) to log E nats (all are equal). It is the
  entropy of single tokens; `load.entropy_fraction` measures how even the loads are.

  Args:
    entropy_sum: over tokens, in nats.
    bins: tokens by entropy / log E, from 0 to 1.
    tokens: number of tokens.
    num_experts: E.
  """
  mean = entropy_sum / max(tokens, 1)
  return {
    "entropy": mean,
    "entropy_fraction": mean / np.log(num_experts) if num_experts > 1 else 0.0,
    "entropy_quartiles": quantiles(bins),
  }


def margin(
  margin_sum: float, bins: Int[np.ndarray, "W"], ties: int, tokens: int
) -> dict[str, Any]:
  """Returns the margin of the last chosen expert over the first rejected one.

  The margin of a token is p_(K) - p_(K+1), with p sorted: 0 to 1/K. A router that adds a
  bias for choosing (sigmoid_bias) may choose others than the K most probable experts; its
  margin is still that of the probabilities. A tie is a margin of exactly 0 between
  logits, which the lowest index wins: with many ties the experts' indices decide.

  Args:
    margin_sum: over tokens.
    bins: tokens by margin, from 0 to 1.
    ties: tokens whose K-th and K+1-th logits are equal.
    tokens: number of tokens.
  """
  return {
    "margin": margin_sum / max(tokens, 1),
    "margin_quartiles": quantiles(bins),
    "tied_fraction": ties / max(tokens, 1),
  }


def quantiles(bins: Int[np.ndarray, "W"]) -> list[float]:
  """Returns the quartiles of a histogram over [0, 1], linear within a bin."""
  total, upto = int(bins.sum()), np.cumsum(bins)
  found = []
  if not total:
    return [0.0, 0.0, 0.0]
  for part in (0.25, 0.5, 0.75):
    wanted = part * total
    here = int(np.searchsorted(upto, wanted))
    inside = (wanted - (upto[here] - bins[here])) / max(int(bins[here]), 1)
    found.append(float((here + inside) / len(bins)))
  return found
