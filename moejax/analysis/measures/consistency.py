"""Routing consistency: whether few experts suffice for a stretch of text.

Letters: E experts, K choices per token, m tokens of a segment, s experts kept.
Source: arXiv:2505.16056, section 3 (segment routing best performance, and segment cache
hit rate).
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from moejax.analysis.measures import subsets


def best_set(
  covered: Int[np.ndarray, "E"],
  counts: Int[np.ndarray, "E"],
  *,
  size: int,
  segments: int,
  choices: int | None,
  seed: int = 0,
  draws: int = 20,
) -> dict[str, Any]:
  """Returns the share of assignments that a segment's s best experts cover, s = 1, 2, ...

  Bounds: s/E to 1. Chance: segments of m tokens with K distinct experts at the layer's
  loads, whose best experts also cover more than s/E.

  Args:
    covered: covered assignments, summed over segments, for each s.
    counts: assignments of each expert.
    size: m.
    segments: number of segments.
    choices: K; None if a token may have any number: then chance draws as many independent
      assignments as a segment has on average.
    seed: of the draws.
    draws: segments drawn for chance, times 100.
  """
  rng, drawn = np.random.default_rng(seed), 100 * draws
  if choices is None or choices == 1:
    per_segment = max(round(int(covered[-1]) / max(segments, 1)), 1)
    load = counts / max(counts.sum(), 1)
    table = rng.multinomial(per_segment, load, size=drawn)
  else:
    table = subsets.dealt(counts, np.full(drawn, size), choices, rng).T
  best = np.cumsum(-np.sort(-table, axis=1), axis=1)
  return {
    "tokens": size,
    "segments": segments,
    "covered": (covered / max(int(covered[-1]), 1)).tolist(),
    "chance": (best / best[:, -1:]).mean(axis=0).tolist(),
  }


def hit_rates(distance: Int[np.ndarray, "D"]) -> Float[np.ndarray, "E"]:
  """Returns the hit rate of a least-recently-used cache of s = 1 .. E experts.

  Args:
    distance: requests by the number of experts used more recently; D = E+1, and the last
      entry counts first uses, which miss at any size.
  """
  return np.cumsum(distance[:-1]) / max(int(distance.sum()), 1)
