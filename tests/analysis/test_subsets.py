"""What K distinct experts of a token give by chance, against enumeration and draws."""

import itertools
from typing import Any

import numpy as np
import pytest

from moejax.analysis.measures import consistency, flow, specialisation, subsets

E, K = 5, 2
WEIGHTS = np.array([0.5, 0.2, 0.1, 0.15, 0.05])
TOKENS = 10**9


def enumerated() -> tuple[np.ndarray, np.ndarray]:
  """Loads and pairs where a set's probability is the product of its weights."""
  load, pairs = np.zeros(E), np.zeros((E, E))
  sets = [list(s) for s in itertools.combinations(range(E), K)]
  whole = sum(np.prod(WEIGHTS[s]) for s in sets)
  for chosen in sets:
    share = np.prod(WEIGHTS[chosen]) / whole
    load[chosen] += share
    pairs[np.ix_(chosen, chosen)] += share
  return np.round(load * TOKENS).astype(np.int64), pairs * TOKENS


def test_weights_and_pairs_are_those_of_all_sets():
  """Recovered from the loads alone."""
  load, pairs = enumerated()
  got = subsets.weights(load, TOKENS, K)
  np.testing.assert_allclose(got, WEIGHTS / WEIGHTS.sum(), rtol=1e-6)
  np.testing.assert_allclose(subsets.together(load, TOKENS, K), pairs, rtol=1e-6)


@pytest.mark.parametrize(("experts", "choices"), [(3, 3), (8, 2), (40, 6)])
@pytest.mark.parametrize("skew", [0.05, 5.0])
def test_pairs_add_up_at_any_loads(experts, choices, skew):
  """A token with expert e has K - 1 others: rows sum to K load, the diagonal included."""
  rng = np.random.default_rng(experts)
  scores = np.log(rng.dirichlet(np.full(experts, skew)) + 1e-9)
  drawn = np.argsort(-(scores + rng.gumbel(size=(500, experts))), axis=1)[:, :choices]
  load = np.bincount(drawn.ravel(), minlength=experts)
  assert subsets.per_token(load, 500) == choices
  pairs = subsets.together(load, 500, choices)
  np.testing.assert_allclose(pairs.sum(axis=1), choices * load, rtol=1e-4, atol=1e-2)
  assert (pairs <= np.minimum(load[:, None], load[None, :]) + 1e-3).all()


def test_a_dealt_table_never_gives_a_token_an_expert_twice():
  """Columns are exact, no cell exceeds its column, and loads hold on average."""
  load, columns = np.array([990, 400, 350, 260]), np.full(100, 10)
  table = subsets.dealt(load, columns, 2, np.random.default_rng(0))
  np.testing.assert_array_equal(table.sum(axis=0), 2 * columns)
  assert table.max() <= 10
  np.testing.assert_allclose(table.sum(axis=1), load, atol=80)


def drawn_sets(
  rng: np.random.Generator, tokens: int, experts: int, choices: int
) -> np.ndarray:
  """Which of E experts each token has, K at random."""
  order = np.argsort(rng.random((tokens, experts)), axis=1)[:, :choices]
  chosen = np.zeros((tokens, experts), np.int64)
  np.put_along_axis(chosen, order, 1, axis=1)
  return chosen


@pytest.mark.parametrize(("experts", "choices"), [(4, 2), (16, 8)])
def test_a_router_that_knows_nothing_is_at_chance(experts, choices):
  """Random sets of distinct experts: words, domains, segments and flow measure chance."""
  rng = np.random.default_rng(0)
  tokens, words = 20_000, 200
  ids = rng.integers(words, size=tokens)

  chosen = drawn_sets(rng, tokens, experts, choices)
  served = np.zeros((experts, words), np.int64)
  np.add.at(served.T, ids, chosen)
  found: dict[str, Any] = specialisation.by_word(served, np.bincount(ids), choices)
  assert found["favourite"] == pytest.approx(found["chance"], abs=0.005)
  domains = served.reshape(experts, 2, -1).sum(axis=2)
  found = specialisation.by_domain(domains, choices, draws=100)
  assert abs(found["information_fraction"] - found["chance"]) < 4 * found["chance_std"]
  by_segment = chosen.reshape(-1, 16, experts).sum(axis=1)
  covered = np.cumsum(-np.sort(-by_segment, axis=1), axis=1).sum(axis=0)
  found = consistency.best_set(
    covered, chosen.sum(axis=0), size=16, segments=tokens // 16, choices=choices
  )
  np.testing.assert_allclose(found["covered"], found["chance"], atol=0.005)


@pytest.mark.parametrize(("experts", "choices"), [(4, 1), (4, 2), (16, 8)])
def test_two_layers_that_know_nothing_of_each_other_are_at_chance(experts, choices):
  """The mean information of thirty pairs of them."""
  rng, ratios = np.random.default_rng(0), []
  for _ in range(30):
    one, two = (drawn_sets(rng, 1000, experts, choices) for _ in range(2))
    found = flow.flow(one.T @ two, one.sum(axis=0), two.sum(axis=0), 1000, choices)
    ratios.append(found["information"] / found["chance_information"])
  assert np.mean(ratios) == pytest.approx(1, abs=0.25)


def test_any_number_of_experts_leaves_a_share_at_most_one():
  """Expert choice: each expert's tokens are distinct, so no word has more than all."""
  served, seen = np.array([[20, 18], [19, 3]]), np.array([20, 20])
  found = specialisation.by_word(served, seen, None)
  assert found["chance"] <= 1
  assert subsets.per_token(served.sum(axis=1), 40) is None
