"""The translation tables of docs/conventions.md: each row's own formula, and ours."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import losses
from moejax.routing.base import RouterOptions
from moejax.routing.capacity import capacity_of
from tests.routing.common import route, skewed_logits

T, E, K = 24, 6, 3


def up_to(multiple: int, value: float) -> int:
  return multiple * math.ceil(value / multiple)


CAPACITY = {
  # who: (their formula, our convention)
  "vmoe": (lambda f, t, e, k: up_to(4, math.ceil(f * k * t / e)), "per_assignment"),
  "megatron": (lambda f, t, e, k: math.ceil(f * k * t / e), "per_assignment"),
  "deepspeed": (lambda f, t, e, k: math.ceil(f * k * t / e), "per_assignment"),
  "megablocks": (lambda f, t, e, k: int(f * k * t / e), "per_assignment"),
  "tutel": (lambda f, t, e, k: k * int(f * math.ceil(t / e)), "per_assignment"),
  "flaxformer": (lambda f, t, e, k: round(f * t / e), "per_token"),
  "axlearn": (lambda f, t, e, k: math.floor(f * t / e), "per_token"),
  "praxis": (lambda f, t, e, k: up_to(4, math.floor(f * t / e)), "per_token"),
}


@pytest.mark.parametrize("who", CAPACITY)
def test_the_same_factor_gives_the_same_slots(who):
  """Under the convention the table names, wherever nothing is left to round."""
  formula, convention = CAPACITY[who]
  for tokens, factor in ((48, 1.0), (96, 2.0), (192, 3.0)):
    ours = capacity_of(tokens, E, 2, factor, convention=convention)
    assert formula(factor, tokens, E, 2) == ours


def test_rounding_differs_as_the_table_says():
  """7 of 6 experts' share: MegaBlocks cuts off, we and Megatron round up."""
  ours = capacity_of(7, E, 1, 1.0)
  assert CAPACITY["megatron"][0](1.0, 7, E, 1) == ours == 2
  assert CAPACITY["megablocks"][0](1.0, 7, E, 1) == 1


def mean_probability(probs):
  return np.mean(np.asarray(probs, np.float64), axis=0)


BALANCE = {
  # who: their loss from choices [T,K] and probabilities [T,E], and its factor to ours
  "megatron, megablocks, deepspeed, axlearn": (
    lambda chosen, p: E * np.sum(np.bincount(chosen.ravel(), minlength=E) / (T * K) * p),
    1,
  ),
  "flaxformer, hf mixtral, maxtext": (
    lambda chosen, p: E * np.sum(np.bincount(chosen.ravel(), minlength=E) / T * p),
    K,
  ),
  "levanter mixtral": (
    lambda chosen, p: (
      E * np.sum(np.bincount(chosen.ravel(), minlength=E) / (T * K) * p / K)
    ),
    1 / K,
  ),
}


@pytest.mark.parametrize("who", BALANCE)
def test_coefficients_translate(who):
  """Theirs is ours times the table's factor, off balance too."""
  formula, factor = BALANCE[who]
  routing = route(
    "top_k", skewed_logits(3, T, E), RouterOptions(num_experts=E, num_selected=K)
  )
  valid = jnp.ones(T, bool)
  ours = float(losses.balance_loss(routing.probs, routing.stats.chosen, valid))
  chosen = np.asarray(routing.expert).reshape(T, K)
  theirs = formula(chosen, mean_probability(routing.probs))
  assert theirs == pytest.approx(factor * ours, rel=1e-5)
  assert abs(ours - 1) > 0.05


def test_first_choices_alone():
  """V-MoE, Praxis, AXLearn Top2, DeepSpeed, Tutel: fractions of first choices."""
  routing = route(
    "top_k", skewed_logits(4, T, E), RouterOptions(num_experts=E, num_selected=K)
  )
  valid = jnp.ones(T, bool)
  first = np.asarray(routing.expert).reshape(T, K)[:, 0]
  theirs = E * np.sum(
    np.bincount(first, minlength=E) / T * mean_probability(routing.probs)
  )
  counts = losses.first_choices(routing, valid)
  ours = losses.balance_loss(routing.probs, counts, valid)
  assert float(ours) == pytest.approx(theirs, rel=1e-5)


def test_a_softmax_over_the_chosen_is_renormalising_before_drops():
  """Mixtral's order of the two, and DeepSpeed's sum over the survivors."""
  logits = skewed_logits(5, T, E)
  options = RouterOptions(num_experts=E, num_selected=2, renormalize="before_drop")
  routing = route("top_k", logits, options)
  best = -np.sort(-logits.astype(np.float64), axis=1)[:, :2]
  expected = np.exp(best) / np.exp(best).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(routing.gate.reshape(T, 2), expected, rtol=1e-5)
  options = RouterOptions(
    num_experts=E, num_selected=2, renormalize="after_drop", capacity=3
  )
  routing = route("top_k", logits, options)
  kept = np.asarray(routing.kept).reshape(T, 2)
  total = np.asarray(routing.gate).reshape(T, 2).sum(axis=1)
  np.testing.assert_allclose(total, kept.any(axis=1), rtol=1e-6)
  assert (kept.sum(axis=1) == 1).any()
