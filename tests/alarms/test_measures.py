"""The numbers that alarms look at, by hand calculation."""

import math
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.alarms.measures import Deaths, alarm_numbers, router_numbers
from moejax.config import AlarmConfig, MoEConfig
from moejax.config import router as config_router
from moejax.routing.base import RouterStats

LEARNED = config_router.make_router(MoEConfig())
FIXED = config_router.make_router(MoEConfig(router="hash"))


def make_stats(chosen, **others) -> RouterStats:
  """Ten tokens in each of two layers of four experts; what is asked for is computed."""
  chosen = np.asarray(chosen, np.float32)
  two = np.ones(2, np.float32)
  values = {
    "num_valid": 10 * two,
    "chosen": chosen,
    "load": chosen,
    "importance": chosen,
    "entropy": two,
    "dropped_tokens": 0 * two,
    "top_gate": 5 * two,
    "top_logit": 30 * two,
  }
  arrays: dict[str, Any] = {k: jnp.asarray(v) for k, v in (values | others).items()}
  return RouterStats(**arrays)


HEALTH = types.SimpleNamespace(
  gradient=np.asarray([2.0, 0.5], np.float32),
  other_gradient=np.asarray(0.5, np.float32),
  bias_span=np.asarray([0.0, 0.3], np.float32),
)


def numbers_of(stats, routers=(LEARNED, LEARNED), **others):
  given = {"aux": {}, "loss": 1.0, "unavoidable": np.zeros(2)} | others
  own = router_numbers(stats, HEALTH, routers)
  return alarm_numbers(stats, own, routers=routers, **given)


def test_loads_from_even_to_every_token():
  """One choice per token: even is 0 and entropy 1, all to one is 1 and 0; between them,
  seven of ten tokens are (0.7 - 0.25) / 0.75."""
  found = numbers_of(make_stats([[2.5] * 4, [10, 0, 0, 0]]))
  np.testing.assert_allclose(found["max_load"], [0, 1], atol=1e-12)
  np.testing.assert_allclose(found["min_load_entropy"], [1, 0], atol=1e-12)
  found = numbers_of(make_stats([[7, 1, 1, 1], [5, 5, 0, 0]]))
  np.testing.assert_allclose(found["max_load"], [0.6, (0.5 - 0.25) / 0.75])
  half = math.log(2) / math.log(4)
  assert found["min_load_entropy"][1] == pytest.approx(half)


def test_of_two_choices_an_expert_gets_one():
  """With K = 2, an expert that every token chooses has load 1, as with K = 1."""
  found = numbers_of(make_stats([[10, 10, 0, 0], [5] * 4]))
  np.testing.assert_allclose(found["max_load"], [1, 0], atol=1e-12)


def test_experts_left_out_of_a_step_are_not_missed():
  """Under expert dropout two experts are even among themselves."""
  present = np.asarray([[1, 1, 0, 0]] * 2, np.float32)
  found = numbers_of(make_stats([[5, 5, 0, 0]] * 2, present=present))
  np.testing.assert_allclose(found["max_load"], 0, atol=1e-12)
  np.testing.assert_allclose(found["min_load_entropy"], 1)


def test_gradients_scores_biases_drops_and_terms():
  stats = make_stats([[2.5] * 4] * 2, load=np.full((2, 4), 1.5, np.float32))
  found = numbers_of(
    stats,
    aux={"balance_loss": 0.3, "entropy_bonus": -0.8},
    loss=2.0,
    unavoidable=np.full(2, 0.25),
  )
  np.testing.assert_allclose(found["max_gradient"], [4, 1])
  np.testing.assert_allclose(found["min_gradient"], [4, 1])
  np.testing.assert_allclose(found["max_gate"], 0.5)
  np.testing.assert_allclose(found["max_logit"], 3)
  np.testing.assert_allclose(found["max_bias_span"], [0, 0.3], rtol=1e-6)
  np.testing.assert_allclose(found["max_drops"], (0.4 - 0.25) / 0.75)
  np.testing.assert_allclose(found["max_aux_share"], [0.4])


@pytest.mark.parametrize("factor", [0.1, 0.4, 0.5, 1.0, 1.25])
def test_a_collapse_is_seen_in_the_drops_at_any_capacity(factor):
  """One expert of four with all tokens fills a quarter of the slots: of what even loads
  would keep, 1 - factor / 4 / min(factor, 1) is lost, above the default threshold. Even
  loads lose nothing."""
  kept = 10 * min(factor, 1.0)
  stats = make_stats(
    [[2.5] * 4, [10, 0, 0, 0]],
    load=[[kept / 4] * 4, [2.5 * factor, 0, 0, 0]],
  )
  even, collapsed = numbers_of(stats, unavoidable=np.full(2, 1 - kept / 10))["max_drops"]
  assert even == pytest.approx(0, abs=1e-6)
  assert collapsed == pytest.approx(1 - factor / 4 / min(factor, 1), abs=1e-6)
  limit = AlarmConfig().max_drops
  assert limit is not None and even < limit < collapsed


def test_nothing_is_asked_of_a_router_that_does_not_learn():
  """Its load follows from the text; it still may drop too much."""
  found = numbers_of(make_stats([[10, 0, 0, 0]] * 2), routers=(LEARNED, FIXED))
  for name in ("max_load", "min_load_entropy", "max_gate", "max_logit", "min_gradient"):
    assert np.isfinite(found[name][0]) and np.isnan(found[name][1]), name
  assert np.all(np.isfinite(found["max_drops"]))


def test_a_step_without_tokens_says_nothing():
  empty = np.zeros(2, np.float32)
  found = numbers_of(make_stats(np.zeros((2, 4)), num_valid=empty), loss=0.0)
  for name in ("max_load", "max_gate", "max_logit", "max_drops", "max_aux_share"):
    assert np.all(np.isnan(found[name])), name


def test_deaths_count_steps_from_the_first_without_a_token():
  """An expert that comes back starts anew; one left out of a step neither dies nor
  comes back."""
  deaths = Deaths()
  alive, dead = [[5, 5, 5, 5]] * 2, [[5, 5, 5, 5], [0, 5, 5, 5]]
  assert deaths(10, make_stats(alive)).tolist() == [0, 0]
  assert deaths(20, make_stats(dead)).tolist() == [0, 0]
  assert deaths(30, make_stats(dead)).tolist() == [0, 10]
  out = np.asarray([[0, 1, 1, 1]] * 2, np.float32)
  assert deaths(40, make_stats([[0, 5, 5, 5]] * 2, present=out)).tolist() == [0, 20]
  assert deaths(50, make_stats(alive)).tolist() == [0, 0]
  assert deaths(60, make_stats(dead)).tolist() == [0, 0]


def test_dead_experts_are_not_seen_in_a_step_without_tokens():
  deaths = Deaths()
  empty = make_stats(np.zeros((2, 4)), num_valid=np.zeros(2, np.float32))
  assert deaths(1, empty).tolist() == deaths(9, empty).tolist() == [0, 0]
