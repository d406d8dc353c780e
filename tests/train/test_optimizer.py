"""Schedules by hand, the decay mask, and what an update does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.config import OptimizerConfig
from moejax.errors import ConfigError
from moejax.train import optimizer as optimizer_lib

PEAK = 0.4


def _rates(num_steps: int, **fields) -> list[float]:
  config = OptimizerConfig(learning_rate=PEAK, **fields)
  schedule = optimizer_lib.make_schedule(config, num_steps)
  return [float(schedule(jnp.int32(s))) / PEAK for s in range(num_steps)]


class TestSchedules:
  """Values as fractions of the peak, worked out by hand from the definitions."""

  def test_warmup_starts_above_zero_and_reaches_the_peak_at_its_last_step(self):
    rates = _rates(8, schedule="linear", warmup_steps=4, final_fraction=0.0)
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)

  def test_linear_ends_exactly_at_its_final_fraction(self):
    # After a warmup of 4, t = 1/4, 2/4, 3/4, 1 of the way from 1 down to 0.2.
    rates = _rates(8, schedule="linear", warmup_steps=4, final_fraction=0.2)
    np.testing.assert_allclose(rates[4:], [0.8, 0.6, 0.4, 0.2], rtol=1e-6)

  def test_cosine_is_halfway_in_the_middle(self):
    # cos(pi/4) = 0.70711, so t = 1/4 gives 0.5 + 0.5 * 0.70711 = 0.85355.
    rates = _rates(5, schedule="cosine", warmup_steps=1, final_fraction=0.0)
    np.testing.assert_allclose(rates, [1.0, 0.85355, 0.5, 0.14645, 0.0], atol=1e-5)

  def test_constant_decay_keeps_the_peak_until_the_last_fraction(self):
    fields = {"warmup_steps": 2, "decay_fraction": 0.4, "final_fraction": 0.0}
    rates = _rates(10, schedule="constant_decay", **fields)
    # Constant to step 6 of 10, then four equal steps down to 0.
    expected = [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0]
    np.testing.assert_allclose(rates, expected, atol=1e-6)

  def test_inverse_sqrt_halves_at_four_times_the_warmup(self):
    rates = _rates(16, schedule="inverse_sqrt", warmup_steps=4)
    np.testing.assert_allclose([rates[3], rates[15]], [1.0, 0.5], rtol=1e-6)

  def test_inverse_sqrt_does_not_know_the_length_of_the_run(self):
    short = _rates(6, schedule="inverse_sqrt", warmup_steps=2)
    long = _rates(12, schedule="inverse_sqrt", warmup_steps=2)
    assert long[:6] == short

  @pytest.mark.parametrize("name", optimizer_lib.SCHEDULES)
  def test_a_run_shorter_than_its_warmup_only_warms_up(self, name):
    rates = _rates(3, schedule=name, warmup_steps=10)
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.3], rtol=1e-6)

  def test_an_unknown_name_is_refused_with_the_known_ones(self):
    with pytest.raises(ConfigError, match="schedule=cosinus.*cosine"):
      optimizer_lib.make_schedule(OptimizerConfig(schedule="cosinus"), 10)


AXES = {
  "embedding": {"table": ("vocab", "width"), "head": ("width", "vocab")},
  "unit": {
    "norm": {"scale": ("layer", "norm")},
    "attention": {
      "query": ("layer", "width", "heads", "head_dim"),
      "query_bias": ("layer", "heads", "head_dim"),
    },
    "moe": {"w_in": ("layer", "expert", "width", "hidden")},
  },
}


def test_only_matrices_decay_and_stacking_makes_no_matrix():
  """A norm scale stacked over layers has two dimensions and is still no matrix."""
  assert optimizer_lib.decay_mask(AXES) == {
    "embedding": {"table": False, "head": True},
    "unit": {
      "norm": {"scale": False},
      "attention": {"query": True, "query_bias": False},
      "moe": {"w_in": True},
    },
  }


def _apply(config: OptimizerConfig, params, gradients, *, rate=0.1):
  optimizer = optimizer_lib.make_optimizer(
    config, num_steps=10, axes=PARAM_AXES, trained=TRAINED
  )

  @jax.jit
  def update(gradients, opt_state, params):
    return optimizer.apply(
      gradients,
      opt_state,
      params,
      learning_rate=jnp.float32(rate),
      gradient_norm=optax.tree.norm(gradients),
    )

  return update(gradients, optimizer.init(params), params)


PARAM_AXES = {"w": ("width", "hidden"), "scale": ("norm",)}
TRAINED = {"w": True, "scale": True}
PARAMS = {"w": jnp.full((2, 2), 2.0), "scale": jnp.full((2,), 2.0)}


def test_decay_alone_shrinks_matrices_by_rate_times_decay():
  """With zero gradients AdamW leaves only w -= 0.1 * 0.5 * w: 2 -> 1.9."""
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  params, _ = _apply(OptimizerConfig(weight_decay=0.5), PARAMS, zeros)
  np.testing.assert_allclose(params["w"], 1.9, rtol=1e-6)
  np.testing.assert_allclose(params["scale"], 2.0)


def test_first_adam_step_has_the_size_of_the_rate():
  """After bias correction the first step is lr * g / |g|, whatever the gradient."""
  gradients = jax.tree.map(lambda p: jnp.full_like(p, -3.0), PARAMS)
  params, _ = _apply(OptimizerConfig(weight_decay=0.0, clip_norm=0.0), PARAMS, gradients)
  np.testing.assert_allclose(params["w"], 2.1, rtol=1e-5)


def test_clipping_scales_to_the_norm_and_not_below_it():
  """Lion's first moment is (1 - beta2) * clipped gradient: the scale is visible."""
  config = OptimizerConfig(name="lion", clip_norm=1.0, weight_decay=0.0, beta2=0.0)
  gradients = {"w": jnp.full((2, 2), 2.0), "scale": jnp.zeros(2)}  # norm 4
  _, opt_state = _apply(config, PARAMS, gradients)
  np.testing.assert_allclose(opt_state.mu["w"], 0.5, rtol=1e-6)
  small = jax.tree.map(lambda g: g / 8.0, gradients)  # norm 0.5
  _, opt_state = _apply(config, PARAMS, small)
  np.testing.assert_allclose(opt_state.mu["w"], 0.25, rtol=1e-6)


@pytest.mark.parametrize("name", optimizer_lib.OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_optimizer_goes_downhill_and_keeps_types(name, dtype):
  """Parameters keep their type, the state keeps its own (float32) under jit."""
  params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
  gradients = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.float32), PARAMS)
  config = OptimizerConfig(name=name)
  before = optimizer_lib.make_optimizer(
    config, num_steps=9, axes=PARAM_AXES, trained=TRAINED
  ).init(params)
  new, after = _apply(config, params, gradients)
  types = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
  assert types(new) == types(params)
  assert types(after) == types(before)
  assert all(bool(jnp.all(n < p)) for n, p in zip(new.values(), params.values()))


def test_an_unknown_optimizer_is_refused_with_the_known_ones():
  config = dataclasses.replace(OptimizerConfig(), name="adam")
  with pytest.raises(ConfigError, match="name=adam is unknown.*adamw"):
    optimizer_lib.make_optimizer(config, num_steps=1, axes={}, trained={})
