"""Numbers at the edge of float32: values are right, and gradients are finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import MoE
from moejax.routing import losses, registry
from moejax.routing.base import RouterInputs, SlotPolicy
from moejax.routing.queueing import normalize
from moejax.routing.registry import ROUTERS

SELECTED = [name for name, router in ROUTERS.items() if not router.has_table]


@pytest.mark.parametrize("name", SELECTED)
def test_a_group_of_padding_alone_has_no_part_in_the_gradient(name):
  """That of the other group is what it is without: NaN times zero would be NaN."""
  k = ROUTERS[name].fixed_selected or 2
  sizes = {"num_selected": k, "capacity_factor": 1.0, "group_size": 6}
  rngs = nnx.Rngs(0)
  layer = MoE(width=8, num_experts=4, hidden=8, router=name, **sizes, rngs=rngs)
  graph, state = nnx.split(layer)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)
  valid = jnp.asarray([[True] * 6, [False] * 6])

  @jax.jit
  def gradient(state, x):
    def loss(state, x):
      y, aux = nnx.merge(graph, state)(x, valid, train=True, key=jax.random.key(1))
      return jnp.sum(jnp.sin(y)) + aux.loss

    return jax.value_and_grad(loss, (0, 1), allow_int=True)(state, x)

  loss, (of_state, of_x) = gradient(state, x)
  assert np.isfinite(loss)
  for leaf in jax.tree.leaves(of_state):
    assert np.isfinite(leaf).all()
  assert np.isfinite(of_x).all() and not np.any(of_x[1])


@pytest.mark.parametrize("norm", [1.0, 2.0])
@pytest.mark.parametrize("exponent", [-18, -20, -30, -37])
def test_small_gates_are_normalised_with_finite_gradients(exponent, norm):
  gate = jnp.asarray([[3.0, 4.0], [0.3, 0.4]], jnp.float32)
  gate = gate * jnp.asarray([[10.0**exponent], [1.0]], jnp.float32)
  length = 7 if norm == 1 else 5
  np.testing.assert_allclose(
    normalize(gate, norm), [[3 / length, 4 / length]] * 2, rtol=1e-5
  )
  slope = jax.grad(lambda g: jnp.sum(jnp.cos(normalize(g, norm))))(gate)
  assert np.isfinite(slope).all() and np.abs(slope[1]).max() > 0


@pytest.mark.parametrize("name", ["sigmoid_bias", "quantile_bias", "quantile_balancing"])
@pytest.mark.parametrize("level", [-30, -46, -95, -150])
def test_sigmoids_of_very_low_logits_are_shares_of_exponentials(name, level):
  """Where all sigmoids of a token underflow, `probs` are the softmax they tend to."""
  logits = jnp.asarray([[level, level + 1.0, level - 0.5, level]], jnp.float32)
  policy = SlotPolicy(num_experts=4, num_selected=2)

  def probs(logits):
    params = {"bias": jnp.zeros(4)}
    inputs = RouterInputs(logits=logits, valid=jnp.ones(1, bool), params=params)
    return registry.make(name, {})(inputs, policy).probs

  exact = np.exp(np.asarray(logits, np.float64) - level)
  np.testing.assert_allclose(jax.jit(probs)(logits), exact / exact.sum(), rtol=1e-5)
  slope = jax.jit(jax.grad(lambda z: jnp.sum(jnp.square(probs(z)))))(logits)
  assert np.isfinite(slope).all()


def test_of_k_experts_each_is_sure_to_be_chosen():
  """Shazeer's load is then constant, and its loss 0."""
  clean = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
  found = losses.load_probability(clean, clean + 1.0, jnp.ones_like(clean), 3)
  np.testing.assert_array_equal(found, 1.0)
  assert losses.load_loss(found, jnp.ones(5, bool)) == 0


@pytest.mark.parametrize("scale", [0.0, 1e-26, 1e-8])
def test_noise_that_changes_nothing_has_finite_slopes(scale):
  clean = jnp.asarray([[0.5, -1.0, 2.0, 0.1]], jnp.float32)

  def total(clean, scale):
    return jnp.sum(
      losses.load_probability(clean, clean, scale, 2) * jnp.arange(4.0)[None]
    )

  scales = jnp.full_like(clean, scale)
  assert np.isfinite(total(clean, scales))
  for slope in jax.grad(total, (0, 1))(clean, scales):
    assert np.isfinite(slope).all()
