"""Balancing biases: where a step goes, against the normal distribution by hand."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moejax.routing import bias as bias_lib
from moejax.routing.base import RouterInputs, RouterStats, SlotPolicy
from moejax.routing.registry import ROUTERS

quantile_step = jax.jit(bias_lib.quantile_step, static_argnames="rate")


def stats_of(chosen, num_valid, mean, spread) -> RouterStats:
  """Of one layer, whose experts' scores have these moments."""
  chosen = jnp.asarray(chosen, jnp.float32)
  valid = jnp.float32(num_valid)
  mean, spread = np.asarray(mean, np.float32), np.asarray(spread, np.float32)
  moments = jnp.asarray(np.stack([mean, mean**2 + spread**2]) * num_valid)
  return RouterStats(
    num_valid=valid,
    chosen=chosen,
    load=chosen,
    importance=chosen,
    entropy=valid,
    dropped_tokens=valid,
    extra={"moments": moments},
  )


def test_the_step_is_the_distance_of_two_normal_quantiles():
  """Three experts, K=1, 100 tokens: shares 0.6, 0.3, 0.1, wanted 1/3 each."""
  spread = np.array([0.1, 0.2, 0.05])
  stats = stats_of([60, 30, 10], 100, [0.5, 0.4, 0.6], spread)
  got = quantile_step(jnp.zeros(3), stats, 0.5)
  z = statistics.NormalDist().inv_cdf
  expected = 0.5 * spread * np.array([z(1 / 3) - z(f) for f in (0.6, 0.3, 0.1)])
  np.testing.assert_allclose(got, expected - expected.mean(), rtol=2e-4)


@settings(deadline=None, max_examples=50)
@given(
  st.lists(st.integers(0, 50), min_size=2, max_size=6),
  st.integers(1, 3),
)
# Balanced, where the quantile of one number has two last bits: computed by itself, and
# in a vector.
@example([41, 41, 41], 1)
@example([8, 8, 8], 3)
def test_a_step_is_up_exactly_for_experts_below_their_share(counts, k):
  """Equal spreads: biases are ordered as loads are, and balance is a fixed point.

  But for rounding: the last bit of a quantile, 1e-7, times the rate and the spread, 0.02.
  An assignment too many is a step of 1e-4 and more.
  """
  counts = np.asarray(counts)
  tokens = max(1, int(counts.sum()) // k, int(counts.max()))
  same = np.ones(len(counts))
  stats = stats_of(counts, tokens, 0.5 * same, 0.1 * same)
  step = np.asarray(quantile_step(jnp.zeros(len(counts)), stats, 0.2))
  assert np.isfinite(step).all() and abs(step.mean()) < 1e-6
  order = np.argsort(counts, kind="stable")
  assert (np.diff(step[order]) <= 1e-6).all()
  if len(set(counts.tolist())) == 1:
    np.testing.assert_allclose(step, 0, atol=1e-8)


def test_a_batch_of_padding_moves_nothing():
  before = jnp.asarray([0.3, -0.1, 0.0])
  stats = stats_of([0, 0, 0], 0, [0, 0, 0], [0, 0, 0])
  got = quantile_step(before, stats, 0.2)
  np.testing.assert_array_equal(got, before)


def test_quantile_steps_balance_where_sign_steps_have_hardly_begun():
  """Scores far from equal: after 20 steps no expert has 1.1 times its share.

  Sign steps of DeepSeek-V3's 0.001 cannot have moved a bias by more than 0.02.
  """
  rng = np.random.default_rng(0)
  centres = np.linspace(-1.5, 1.5, 8)
  logits = jnp.asarray(rng.normal(centres, 1.0, (512, 8)), jnp.float32)
  valid = jnp.arange(512) < 500

  def max_load(name: str) -> float:
    router, policy = ROUTERS[name](), SlotPolicy(num_experts=8, num_selected=2)

    @jax.jit
    def step(bias):
      params = {"bias": bias}
      inputs = RouterInputs(logits=logits, valid=valid, params=params)
      stats = router(inputs, policy).stats
      return router.update(params, stats)["bias"], stats.chosen

    bias, chosen = step(jnp.zeros(8))
    for _ in range(20):
      bias, chosen = step(bias)
    assert float(chosen.sum()) == 2 * 500
    return float(chosen.max()) / (2 * 500 / 8)

  assert max_load("quantile_bias") < 1.1
  assert max_load("sigmoid_bias") > 2


def test_moments_are_sums_over_tokens_that_are_not_padding():
  """Of sigmoid scores and of their squares, by numpy."""
  logits = np.random.default_rng(1).normal(size=(10, 4)).astype(np.float32)
  inputs = RouterInputs(logits=jnp.asarray(logits), valid=jnp.arange(10) < 7)
  options = SlotPolicy(num_experts=4, num_selected=2)
  route = jax.jit(lambda inputs: ROUTERS["quantile_bias"]()(inputs, options).stats)
  moments = route(inputs).extra["moments"]
  scores = 1 / (1 + np.exp(-logits[:7].astype(np.float64)))
  np.testing.assert_allclose(moments, [scores.sum(0), (scores**2).sum(0)], rtol=1e-5)
