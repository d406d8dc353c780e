"""The translation tables of docs/conventions.md: each row's own formula, and ours."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ModelConfig, MoEConfig
from moejax.models.decoder import Decoder
from moejax.routing import losses
from moejax.routing.base import SlotPolicy
from moejax.routing.capacity import capacity_of
from moejax.routing.queueing import normalize
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
  return np.mean(np.asarray(probs, np.float64), axis=-2)


def shares(chosen, divide_by):
  """Assignments of each expert over `divide_by`; choices are [T,K]."""
  return np.bincount(chosen.ravel(), minlength=E) / divide_by


def each_layer(scale, divide_by):
  """Their loss of every layer: scale * sum_e (count_e / divide_by) P_e."""
  return lambda chosen, p: np.array(
    [scale * np.sum(shares(c, divide_by) * q) for c, q in zip(chosen, p)]
  )


def pooled(chosen, p):
  """HF: fractions and probabilities are means over layers before they are multiplied."""
  layers = len(chosen)
  return E * np.sum(shares(chosen, layers * T) * p.mean(axis=0))


LAYERS = 2
BALANCE = {
  # who: their loss of a whole model, from choices [L,T,K] and mean probabilities [L,E],
  # and what their coefficient is multiplied by to be ours, which adds up layers.
  "megatron, megatron-deepspeed, praxis (top_k), v-moe, swin-moe": (
    lambda chosen, p: each_layer(E, T * K)(chosen, p).sum(),
    1,
  ),
  "megablocks, axlearn": (
    lambda chosen, p: each_layer(E, T * K)(chosen, p).sum() / LAYERS,
    1 / LAYERS,
  ),
  "flaxformer under t5x, maxtext": (
    lambda chosen, p: each_layer(E, T)(chosen, p).mean(),
    K / LAYERS,
  ),
  "hf mixtral": (pooled, K / LAYERS),
  "levanter mixtral": (
    lambda chosen, p: each_layer(E / K, T * K)(chosen, p).sum(),
    1 / K,
  ),
}


def two_layers(seeds):
  """Choices, probabilities, and our own losses of two layers."""
  options = SlotPolicy(num_experts=E, num_selected=K)
  routings = [route("top_k", skewed_logits(seed, T, E), options) for seed in seeds]
  valid = jnp.ones(T, bool)
  ours = [float(losses.balance_loss(r.probs, r.stats.chosen, valid)) for r in routings]
  chosen = np.stack([np.asarray(r.assignments.expert).reshape(T, K) for r in routings])
  return chosen, mean_probability(np.stack([r.probs for r in routings])), ours


@pytest.mark.parametrize("who", BALANCE)
def test_coefficients_translate_for_a_model_of_two_layers(who):
  """Their loss of the model times their coefficient = ours times the translated one.

  Ours is the sum over layers (`DecoderOutput.aux`). Off balance, and with layers that
  differ; HF's, which multiplies means over layers, is another function there, and equal
  where both layers do the same.
  """
  formula, factor = BALANCE[who]
  chosen, p, ours = two_layers((3, 3) if who == "hf mixtral" else (3, 8))
  assert formula(chosen, p) == pytest.approx(factor * sum(ours), rel=1e-5)
  assert all(abs(loss - 1) > 0.05 for loss in ours)


def test_pooling_layers_is_another_loss_where_layers_differ():
  """HF's hides what one layer's imbalance is if another's is the opposite."""
  chosen, p, _ = two_layers((3, 3))
  mirrored = (np.stack([chosen[0], E - 1 - chosen[0]]), np.stack([p[0], p[0][::-1]]))
  assert pooled(*mirrored) < 0.99 * pooled(chosen, p)


def test_the_decoder_adds_up_the_losses_of_its_layers():
  """Two equal layers have twice the aux terms of one: what the table rests on."""

  def aux_of(layers: int) -> dict[str, float]:
    model = Decoder(
      ModelConfig(num_layers=layers, width=8, num_heads=2, hidden=8),
      MoEConfig(num_experts=4, num_selected=2, hidden=8, router="top_k", every=1),
      vocab_size=16,
    )
    # Without weights every layer sees uniform probabilities.
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.shapes())
    tokens = jnp.zeros((2, 8), jnp.int32)
    run = jax.jit(lambda p: model(p, tokens, train=True, capacity_factor=None).aux)
    return {name: float(value) / tokens.size for name, value in run(params).items()}

  one, two = aux_of(1), aux_of(2)
  assert one["balance_loss"] == pytest.approx(1.0)
  assert one["z_loss"] == pytest.approx(math.log(4) ** 2)
  for name in ("balance_loss", "z_loss"):
    assert two[name] == pytest.approx(2 * one[name])


def test_first_choices_alone():
  """V-MoE, Praxis, AXLearn Top2, DeepSpeed, Tutel: fractions of first choices."""
  routing = route(
    "top_k", skewed_logits(4, T, E), SlotPolicy(num_experts=E, num_selected=K)
  )
  valid = jnp.ones(T, bool)
  first = np.asarray(routing.assignments.expert).reshape(T, K)[:, 0]
  theirs = E * np.sum(
    np.bincount(first, minlength=E) / T * mean_probability(routing.probs)
  )
  counts = losses.first_choices(routing, valid)
  ours = losses.balance_loss(routing.probs, counts, valid)
  assert float(ours) == pytest.approx(theirs, rel=1e-5)


def test_a_softmax_over_the_chosen_is_renormalising_before_drops():
  """Mixtral's order of the two, and DeepSpeed's sum over the survivors."""
  logits = skewed_logits(5, T, E)
  options = SlotPolicy(num_experts=E, num_selected=2, renormalize="before_drop")
  routing = route("top_k", logits, options)
  best = -np.sort(-logits.astype(np.float64), axis=1)[:, :2]
  expected = np.exp(best) / np.exp(best).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(routing.assignments.gate.reshape(T, 2), expected, rtol=1e-5)
  options = SlotPolicy(
    num_experts=E, num_selected=2, renormalize="after_drop", capacity=3
  )
  routing = route("top_k", logits, options)
  kept = np.asarray(routing.assignments.kept).reshape(T, 2)
  total = np.asarray(routing.assignments.gate).reshape(T, 2).sum(axis=1)
  np.testing.assert_allclose(total, kept.any(axis=1), rtol=1e-6)
  assert (kept.sum(axis=1) == 1).any()


@pytest.mark.parametrize("norm", [1.5, 2.0, 8.0, 16.0])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-12])
def test_gates_have_the_norm_that_is_asked_for_however_small_they_are(norm, size):
  """Values and gradients against float64; a row of zeros stays."""
  gate = size * np.random.default_rng(0).uniform(0.1, 1, (5, 3)).astype(np.float32)
  gate[0] = 0
  wide = gate.astype(np.float64)
  scale = np.sum(wide**norm, axis=1, keepdims=True) ** (1 / norm)
  got = normalize(jnp.asarray(gate), norm)
  np.testing.assert_allclose(got[1:], wide[1:] / scale[1:], rtol=1e-5)
  assert not np.any(got[0])
  weight = np.cos(np.arange(15)).reshape(5, 3).astype(np.float32)
  grad = jax.grad(lambda g: jnp.sum(normalize(g, norm) * weight))(jnp.asarray(gate))
  along = np.sum(weight * wide, axis=1, keepdims=True) * wide ** (norm - 1)
  with np.errstate(divide="ignore", invalid="ignore"):
    expected = weight / scale - along / scale ** (norm + 1)
  np.testing.assert_allclose(grad[1:] * size, expected[1:] * size, rtol=1e-3, atol=1e-4)
