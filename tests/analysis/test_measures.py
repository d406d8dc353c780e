"""Measures of an analysis: each against a count by hand on a tiny array."""

import math

import numpy as np
import pytest

from moejax.analysis.measures import (
  choices,
  coactivation,
  consistency,
  drops,
  flow,
  load,
  specialisation,
  tables,
)


def test_load_by_hand():
  """Shares 1/2, 1/4, 1/4, 0: the fullest has twice the mean, the last is dead."""
  found = load.load(np.array([4, 2, 2, 0]), np.array([4.0, 2, 1, 1]), tokens=8)
  assert found["share"] == [0.5, 0.25, 0.25, 0]
  assert found["importance"] == [0.5, 0.25, 0.125, 0.125]
  assert (found["max_ratio"], found["min_ratio"], found["dead"]) == (2, 0, [3])
  # H = 1/2 log 2 + 2 * 1/4 log 4 = 1.5 log 2, of 2 log 2.
  assert found["entropy_fraction"] == pytest.approx(0.75)
  # Absolute differences of all 16 ordered pairs: 2 (1/4 * 4 + 1/2 + 0) / 16 = 3/16.
  assert found["gini"] == pytest.approx((3 / 16) / (2 / 4))


def test_even_load_is_no_spread_at_all():
  found = load.load(np.full(4, 3), np.full(4, 2.0), tokens=8)
  assert (found["max_ratio"], found["cv"], found["gini"]) == (1, 0, 0)
  assert found["entropy_fraction"] == pytest.approx(1)


def test_quartiles_of_a_histogram():
  """All in the third of four bins: its quarters. Half below: the edge between."""
  assert choices.quantiles(np.array([0, 0, 8, 0])) == [0.5625, 0.625, 0.6875]
  assert choices.quantiles(np.array([4, 0, 0, 4]))[1] == 0.25
  assert choices.quantiles(np.zeros(4, int)) == [0, 0, 0]


def test_certainty_and_ties_are_means_over_tokens():
  found = choices.certainty(2 * math.log(2), np.array([0, 2]), tokens=2, num_experts=4)
  assert found["entropy_fraction"] == pytest.approx(0.5)
  assert choices.margin(0.5, np.array([2, 0]), 1, 2)["tied_fraction"] == 0.5


def test_coactivation_counts_all_pairs_by_hand():
  """Tokens {0,1}, {0,1}, {0,2}, {1,2}: N_01 = 2 of N_0 = 3 and N_1 = 3 in 4 tokens."""
  served = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
  found = coactivation.coactivation(served.T @ served, 4, 2)
  assert found["conditional"][0] == [0, pytest.approx(2 / 3), pytest.approx(1 / 3)]
  assert found["lift"][0][1] == pytest.approx(2 * 4 / (3 * 3))
  assert {tuple(p["experts"]) for p in found["top_pairs"]} == {(0, 1), (0, 2), (1, 2)}


def test_all_pairs_equally_often_is_chance():
  """Of four experts: every lift is (K-1) E / (K (E-1)), below 1, which is chance."""
  served = np.array([[i in pair for i in range(4)] for pair in _pairs(4)]) * 1
  found = coactivation.coactivation(served.T @ served, 6, 2)
  apart = ~np.eye(4, dtype=bool)
  np.testing.assert_allclose(np.array(found["lift"])[apart], 2 / 3)
  np.testing.assert_allclose(np.array(found["over_chance"])[apart], 1, rtol=1e-6)


def test_an_expert_of_every_token_prefers_nobody():
  """Expert 0 has all ten tokens, so each other shares all its tokens with it: chance."""
  served = np.array([[1, i < 6, i >= 6] for i in range(10)]) * 1
  found = coactivation.coactivation(served.T @ served, 10, 2)
  np.testing.assert_allclose(found["over_chance"][0], [0, 1, 1], rtol=1e-6)
  assert all(abs(pair["z"]) < 1e-3 for pair in found["top_pairs"])


def _pairs(count: int) -> list[tuple[int, int]]:
  return [(i, j) for i in range(count) for j in range(i + 1, count)]


def test_flow_is_one_to_one_or_nothing():
  """A permutation tells everything (log 2); even rows tell nothing."""
  half = np.array([2, 2])
  one = flow.flow(np.array([[0, 2], [2, 0]]), half, half, 4)
  assert one["information"] == pytest.approx(math.log(2))
  assert one["information_fraction"] == pytest.approx(1)
  assert one["conditional"] == [[0, 1], [1, 0]]
  even = flow.flow(np.full((2, 2), 1), half, half, 4)
  assert even["information"] == 0 and even["chance_information"] == 1 / 8


def test_shuffled_tables_keep_their_sums():
  """Only who is where changes, so that loads and word counts explain nothing."""
  rows, columns = np.array([5, 3, 0]), np.array([4, 0, 4])
  drawn = tables.shuffled(rows, columns, np.random.default_rng(0))
  np.testing.assert_array_equal(drawn.sum(axis=1), rows)
  np.testing.assert_array_equal(drawn.sum(axis=0), columns)


def test_domains_that_own_their_experts_stand_out_from_chance():
  """Each domain has its expert: information 1. One expert for all: 0, as by chance."""
  found = specialisation.by_domain(np.array([[50, 0], [0, 50]]), 1)
  assert found["information_fraction"] == pytest.approx(1)
  assert found["lift"] == [[2, 0], [0, 2]]
  assert found["chance"] < 0.05
  idle = specialisation.by_domain(np.array([[30, 20], [0, 0]]), 1)
  assert idle["information_fraction"] == idle["chance"] == 0


def test_words_rank_by_lift_and_rare_ones_say_nothing():
  """Id 0 always, id 1 half the time, id 2 too rare: as counted by hand."""
  served = np.array([[40, 20, 5], [0, 20, 0]])
  seen = np.array([40, 40, 5])
  first = specialisation.top_words(served, seen, 85)[0]
  assert [(j, n) for j, _, n in first] == [(0, 40), (1, 20)]
  assert first[0][1] == pytest.approx(85 / 65)
  found = specialisation.by_word(served, seen, None)
  assert (found["words"], found["favourite"]) == (2, 0.75)


def test_best_set_of_a_constant_expert():
  """One expert does all: it covers all, in chance too."""
  found = consistency.best_set(
    np.array([64, 64]), np.array([64, 0]), size=16, segments=4, choices=1
  )
  assert found["covered"] == found["chance"] == [1, 1]


def test_hit_rates_count_first_uses_as_misses():
  """Distances 0, 0, 1, never: half hit with one expert kept, three quarters with two."""
  assert consistency.hit_rates(np.array([2, 1, 1])).tolist() == [0.5, 0.75]


def test_drop_rates_by_hand():
  """Of two kinds of token one has none, which is no rate above 0."""
  found = drops.drops(np.array([4, 0]), np.array([1, 0]), np.array([3, 0]), 2)
  assert (found["lost"], found["dropped"]) == ([0.25, 0], [0.375, 0])
  assert found["error"][0] == pytest.approx(math.sqrt(0.25 * 0.75 / 4))
