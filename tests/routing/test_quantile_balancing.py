"""Quantile Balancing: the bias is the quantile, by numpy, over the whole batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import registry
from moejax.routing.base import RouterInputs, RouterStats, SlotPolicy
from moejax.routing.quantile_balancing import QuantileBalancing, quantile_balance

T, E, K = 400, 8, 2
OPTIONS = SlotPolicy(num_experts=E, num_selected=K)


def by_numpy(logits, valid, bias, k=K):
  """kexue.fm/archives/11619: alpha, then beta, then minus beta with mean zero."""
  scores = 1 / (1 + np.exp(-logits.astype(np.float64)))[valid]
  alpha = -np.sort(-(scores + bias), axis=1)[:, k : k + 1]
  margin = -np.sort(-(scores - alpha), axis=0)
  beta = margin[len(scores) * k // scores.shape[1] - 1]
  return -beta + beta.mean()


def spread_logits(seed: int, groups: int = 1) -> np.ndarray:
  rng = np.random.default_rng(seed)
  centres = np.linspace(-1.5, 1.5, E)
  return rng.normal(centres, 1.0, (groups, T, E)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="options")
def stats_of(logits, valid, bias, options=OPTIONS, **extra) -> RouterStats:
  """Of all groups together, as training has them."""
  router = QuantileBalancing()

  def group(logits, valid):
    inputs = RouterInputs(
      logits=logits,
      valid=valid,
      params={"bias": bias},
      key=jax.random.key(0),
      **extra,
    )
    return router(inputs, options).stats

  stats = jax.vmap(group)(jnp.asarray(logits), jnp.asarray(valid))
  return jax.tree.map(lambda leaf: leaf.sum(axis=0), stats)


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_the_bias_is_the_quantile_of_the_batch(groups):
  """Whatever the routing groups: histograms add up, quantiles of groups would not.

  Expert 0's scores differ by group, so that a mean of quantiles would be another number.
  To the width of a bin; padding does not count.
  """
  logits = spread_logits(0, groups)
  logits[..., 0] += np.linspace(0, 2, groups, dtype=np.float32)[:, None]
  valid = np.broadcast_to(np.arange(T) < 360, (groups, T))
  before = np.linspace(0.2, -0.2, E).astype(np.float32)
  stats = stats_of(logits, valid, jnp.asarray(before))
  got = quantile_balance(jnp.asarray(before), stats)
  flat = logits.reshape(-1, E)
  expected = by_numpy(flat, valid.reshape(-1), before)
  # Between the wanted and the next margin any number balances; bins are 4e-3 at most.
  np.testing.assert_allclose(got, expected, atol=4e-3)
  assert abs(float(jnp.mean(got))) < 1e-6


def test_two_iterations_balance_what_sign_steps_hardly_move():
  """On one batch again and again: no expert has 1.05 times its share after ten."""
  logits, valid = spread_logits(1), np.ones((1, T), bool)
  bias, loads = jnp.zeros(E), []
  for _ in range(10):
    stats = stats_of(logits, valid, bias)
    loads.append(np.asarray(stats.chosen))
    bias = quantile_balance(bias, stats)
  assert all(load.sum() == T * K for load in loads)
  assert loads[0].max() > 1.6 * T * K / E
  assert loads[-1].max() < 1.05 * T * K / E


@pytest.mark.parametrize(("noise", "skew"), [(0.02, 1.0), (0.05, 4.0), (1.0, 3.0)])
def test_bins_are_fine_where_the_bias_is_large(noise, skew):
  """Narrow scores far apart: step after step the bias is that of the exact formula, to
  a hundredth of the scores' spread, although it is itself a hundred times as large."""
  rng = np.random.default_rng(5)
  bias, error = np.zeros(E), np.zeros(E)
  for _ in range(12):
    centres = np.linspace(-skew, skew, E)
    logits = rng.normal(centres, noise, (1, T, E)).astype(np.float32)
    stats = stats_of(logits, np.ones((1, T), bool), jnp.asarray(bias, jnp.float32))
    got = quantile_balance(jnp.asarray(bias, jnp.float32), stats)
    exact = by_numpy(logits[0], np.ones(T, bool), bias)
    error = np.abs(np.asarray(got) - exact)
    bias = exact
  assert np.abs(bias).max() > 0.1
  # After the first steps the margins' quantiles are near zero, where bins are narrow.
  assert error.max() < max(2e-3 * noise / 0.02, 1e-3), error


def test_where_all_present_experts_are_chosen_nothing_is_learned():
  """K experts take part: everyone has all tokens, and biases stay where they are."""
  present = jnp.arange(E) < K
  logits = jnp.where(present, jnp.asarray(spread_logits(6)[0]), -1e9)
  bias = jnp.linspace(-0.2, 0.2, E)
  stats = stats_of(logits[None], np.ones((1, T), bool), bias, present=present)
  stats = dataclasses.replace(stats, present=present.astype(jnp.float32))
  got = quantile_balance(bias, stats)
  np.testing.assert_allclose(got, bias, atol=1e-5)


def test_k_of_all_experts_and_padding_alone_move_nothing():
  """K = E has no K+1-th score, and padding no score at all."""
  options = dataclasses.replace(OPTIONS, num_selected=E)
  logits, bias = spread_logits(2), jnp.linspace(-0.1, 0.1, E)
  stats = stats_of(logits, np.ones((1, T), bool), bias, options)
  assert np.isfinite(quantile_balance(bias, stats)).all()
  stats = stats_of(logits, np.zeros((1, T), bool), bias)
  np.testing.assert_array_equal(quantile_balance(bias, stats), bias)


def test_evaluation_counts_nothing():
  """The histogram is for the step alone: none without a key."""
  inputs = RouterInputs(
    logits=jnp.asarray(spread_logits(3)[0]),
    valid=jnp.ones(T, bool),
    params={"bias": jnp.zeros(E)},
  )
  assert not QuantileBalancing()(inputs, OPTIONS).stats.extra


@pytest.mark.parametrize("name", ["sigmoid_bias", "quantile_bias", "quantile_balancing"])
def test_an_expert_that_was_out_says_nothing_about_balance(name):
  """Expert dropout: an absent expert keeps its place among the biases, and the others
  are balanced among themselves."""
  present = jnp.asarray([True] * 6 + [False] * 2)
  rate = {"bias_update_rate": 0.01} if name == "sigmoid_bias" else {}
  router = registry.make(name, rate)
  logits = np.where(present, spread_logits(4)[0], -1e9).astype(np.float32)
  inputs = RouterInputs(
    logits=jnp.asarray(logits),
    valid=jnp.ones(T, bool),
    params={"bias": jnp.zeros(E)},
    key=jax.random.key(0),
    present=present,
  )
  stats = dataclasses.replace(
    router(inputs, OPTIONS).stats, present=present.astype(jnp.float32)
  )
  assert not np.any(stats.chosen[6:])
  moved = np.asarray(router.update(inputs.params, stats)["bias"])
  # Mean zero is kept by taking the same from all, absent ones included.
  np.testing.assert_allclose(moved[6], moved[7], atol=1e-7)
  chosen = np.asarray(stats.chosen)[:6]
  above = chosen > T * K / 6
  steps = moved[:6] - moved[6]
  # A margin of exactly zero (its own K+1-th score) is read as half a bin, 4e-6.
  assert (steps[above] < 0).all() and (steps[~above] > -1e-5).all()
