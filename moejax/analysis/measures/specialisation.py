"""Specialisation: whether experts prefer domains or words, compared with chance.

Every measure comes with its value by chance: for the same loads and the same counts of
words, each token gets as many distinct experts as it has, at random. A value that is not
clearly above chance means nothing.

Letters: E experts, K choices per token, R domains, M vocabulary ids.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from moejax.analysis.measures import subsets, tables

DRAWS = 10
"""Number of random tables whose mean and standard deviation stand for chance."""

MIN_COUNT = 10
"""Minimum occurrences of an id for a meaningful share (OLMoE, section 5.4)."""


def by_domain(
  served: Int[np.ndarray, "E R"],
  choices: int | None,
  *,
  seed: int = 0,
  draws: int = DRAWS,
) -> dict[str, Any]:
  """Returns each domain's shares over experts, and their mutual information.

  `share[d][e]` is the share of domain d's assignments that e computes; over the load of
  e it is the `lift`. `information_fraction` is I(expert; domain) / H(domain): 0 to 1.
  (OLMoE, arXiv:2409.02060, section 5.3, compares shares with k/E. A busy expert is above
  that in every domain, so shares are compared here with the expert's own load.)

  Args:
    served: assignments by expert and domain; domains without tokens are left out.
    choices: K; None if a token may have any number: then assignments are dealt out.
    seed: of the draws.
    draws: number of draws.
  """
  load, domain = served.sum(axis=1), served.sum(axis=0)
  whole = max(int(load.sum()), 1)

  def fraction(table: Int[np.ndarray, "E R"]) -> float:
    return tables.mutual_information(table) / max(tables.entropy(domain), 1e-30)

  def draw(rng: np.random.Generator) -> Int[np.ndarray, "E R"]:
    if choices is None or choices == 1:
      return tables.shuffled(load, domain, rng)
    return subsets.dealt(load, domain // choices, choices, rng)

  return {
    "share": (served / np.maximum(domain, 1)[None]).T.tolist(),
    "lift": tables.lift(served, load, domain, whole).T.tolist(),
    "information_fraction": fraction(served),
  } | chance(draw, fraction, seed, draws)


def by_word(
  served: Int[np.ndarray, "E M"],
  seen: Int[np.ndarray, "M"],
  choices: int | None,
  *,
  seed: int = 0,
  draws: int = DRAWS,
) -> dict[str, Any]:
  """Returns how much of a word's tokens its favourite expert computes.

  `favourite` is the mean, over ids seen at least `MIN_COUNT` times, of max_e N_te / N_t:
  K/E to 1 (OLMoE, section 5.4, for the first choice; here for all K).
  By chance alone a maximum is above the mean load, especially for rare words: compare it
  with `chance`.

  Args:
    served: assignments by expert and id.
    seen: tokens of each id.
    choices: K; None if a token may have any number: then each expert's tokens are dealt
      out separately.
    seed: of the draws.
    draws: number of draws.
  """
  often = seen >= MIN_COUNT
  served, seen = served[:, often], seen[often]

  def favourite(table: Int[np.ndarray, "E M"]) -> float:
    if not table.shape[1]:
      return 0.0
    return float((table / seen[None]).max(axis=0).mean())

  load = served.sum(axis=1)

  def draw(rng: np.random.Generator) -> Int[np.ndarray, "E M"]:
    if choices == 1:
      return tables.shuffled(load, seen, rng)
    if choices is not None:
      return subsets.dealt(load, seen, choices, rng)
    deal = rng.multivariate_hypergeometric
    return np.stack([deal(seen, count, method="marginals") for count in load])

  found = {"words": len(seen), "favourite": favourite(served)}
  return found | chance(draw, favourite, seed, draws)


def chance(
  draw: Callable[[np.random.Generator], Int[np.ndarray, "E n"]],
  measure: Callable[[Int[np.ndarray, "E n"]], float],
  seed: int,
  draws: int,
) -> dict[str, float]:
  """Returns the mean and standard deviation of a measure over random tables."""
  rng = np.random.default_rng(seed)
  found = [measure(draw(rng)) for _ in range(draws)]
  return {"chance": float(np.mean(found)), "chance_std": float(np.std(found))}


def top_words(
  served: Int[np.ndarray, "E M"],
  seen: Int[np.ndarray, "M"],
  tokens: int,
  *,
  top: int = 10,
) -> list[list[tuple[int, float, int]]]:
  """Returns, for each expert, the words of highest lift: (column, lift, count).

  The lift is the expert's rate for the word over its rate for all tokens; words that
  occur fewer than `MIN_COUNT` times have none.
  """
  rate: Float[np.ndarray, "E M"] = served / np.maximum(seen, 1)[None]
  share = served.sum(axis=1, keepdims=True) / max(tokens, 1)
  lift = np.divide(rate, share, out=np.zeros_like(rate), where=share > 0)
  lift[:, seen < MIN_COUNT] = 0
  best = np.argsort(-lift, axis=1, kind="stable")[:, :top]
  return [
    [(int(j), float(lift[e, j]), int(served[e, j])) for j in row if lift[e, j] > 0]
    for e, row in enumerate(best)
  ]
