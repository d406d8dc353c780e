"""Capacity by hand, and the losses against the oracle and their normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import ConfigError
from moejax.routing.capacity import capacity_of
from moejax.routing.losses import balance_loss, z_loss
from moejax.routing.scores import jitter
from tests import reference
from tests.routing.common import skewed_logits


@pytest.mark.parametrize(
  ("num_tokens", "num_experts", "k", "factor", "convention", "want"),
  [
    (4096, 8, 2, 1.25, "per_assignment", 1280),  # 1.25 * 2 * 4096 / 8
    (4096, 8, 2, 1.25, "per_token", 640),
    (10, 4, 1, 1.0, "per_assignment", 3),  # 2.5 goes up
    (10, 1, 1, 1.1, "per_assignment", 10),  # 11, but no expert needs more than T
    (100, 10, 1, 1.1, "per_assignment", 11),  # not 12, as 1.1 * 100 / 10 in floats
    (8, 64, 1, 1.0, "per_assignment", 1),
    (8, 4, 2, 100.0, "per_assignment", 8),  # above T once crashed others
    (8, 4, 2, None, "per_assignment", None),
    (8, 4, 2, None, "slots", None),
  ],
)
def test_capacity(num_tokens, num_experts, k, factor, convention, want):
  """ceil(factor K T / E), within [1, T]; per_token leaves K out; None is dropless."""
  got = capacity_of(num_tokens, num_experts, k, factor, convention=convention)
  assert got == want
  if factor is not None:
    per_token = convention == "per_token"
    hand = reference.capacity_of(num_tokens, num_experts, k, factor, per_token=per_token)
    assert got == hand


def test_slots_are_a_number_whatever_the_group():
  """The factor is C, up to the tokens of the group, and at least min_capacity."""
  for tokens, wanted in ((4, 4), (8, 6), (512, 6)):
    assert capacity_of(tokens, 16, 2, 6.0, convention="slots") == wanted
  assert capacity_of(512, 16, 2, 6.0, convention="slots", min_capacity=9) == 9


def test_minimum_capacity_is_a_floor_but_never_above_the_tokens():
  """min_capacity raises a small C; T still bounds it."""
  assert capacity_of(16, 8, 1, 1.0, min_capacity=4) == 4
  assert capacity_of(3, 8, 1, 1.0, min_capacity=4) == 3


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_capacity_factors_name_the_flag(factor):
  """A factor that gives no slots, or no number of them, is the user's error."""
  with pytest.raises(ConfigError, match="capacity_factor"):
    capacity_of(8, 4, 1, factor)


def test_unknown_convention_names_the_flag():
  """The message says which words would do."""
  with pytest.raises(ConfigError, match=r"capacity_convention=.*slots"):
    capacity_of(8, 4, 1, 1.0, convention="mine")


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_loss_is_one_at_perfect_balance_whatever_k(k):
  """Equal probabilities and equal counts give 1; all on one expert gives E."""
  valid = jnp.ones(8, bool)
  uniform = jnp.full((8, 4), 0.25)
  counts = jnp.full(4, 8.0 * k / 4)
  np.testing.assert_allclose(balance_loss(uniform, counts, valid), 1.0, rtol=1e-6)
  one = jnp.zeros((8, 4)).at[:, 1].set(1.0)
  counts = jnp.zeros(4).at[1].set(8.0)
  np.testing.assert_allclose(balance_loss(one, counts, valid), 4.0, rtol=1e-6)


def test_losses_equal_the_oracle_in_value_and_gradient():
  """Balance and z-loss over valid tokens alone, and their gradients by the logits."""
  logits = skewed_logits(3, 9, 4)
  valid = np.arange(9) % 4 != 1
  counts = np.array([5.0, 4.0, 2.0, 3.0])
  probs = np.stack([reference.softmax(row) for row in logits.astype(np.float64)])

  def balance(logits):
    return balance_loss(jax.nn.softmax(logits), jnp.float32(counts), jnp.asarray(valid))

  value, grad = jax.jit(jax.value_and_grad(balance))(jnp.asarray(logits))
  np.testing.assert_allclose(value, reference.balance_loss(probs, counts, valid), 1e-5)
  want = reference.balance_loss_backward(probs, counts, valid)
  np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-7)
  value, grad = jax.jit(jax.value_and_grad(z_loss))(
    jnp.asarray(logits), jnp.asarray(valid)
  )
  np.testing.assert_allclose(value, reference.z_loss(logits, valid), rtol=1e-5)
  want = reference.z_loss_backward(logits, valid)
  np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-7)


def test_padding_counts_in_no_loss():
  """Appending padding, whatever it holds, changes neither loss; padding alone is 0."""
  logits = skewed_logits(3, 6, 4)
  padded = jnp.asarray(np.concatenate([logits, 50 * np.ones((5, 4), np.float32)]))
  counts = jnp.float32([3, 1, 1, 1])
  valid = jnp.arange(11) < 6
  short = jnp.asarray(logits)
  everyone = jnp.ones(6, bool)
  np.testing.assert_allclose(z_loss(padded, valid), z_loss(short, everyone), rtol=1e-6)
  a = balance_loss(jax.nn.softmax(padded), counts, valid)
  b = balance_loss(jax.nn.softmax(short), counts, everyone)
  np.testing.assert_allclose(a, b, rtol=1e-6)
  nobody = jnp.zeros(11, bool)
  assert balance_loss(jax.nn.softmax(padded), jnp.zeros(4), nobody) == 0
  assert z_loss(padded, nobody) == 0


def test_jitter_stays_within_its_amount_and_keeps_the_dtype():
  """Factors are uniform in [1 - a, 1 + a], in the tokens' own dtype."""
  x = jnp.ones((50, 8), jnp.bfloat16)
  got = jitter(x, jax.random.key(0), 0.1)
  assert got.dtype == jnp.bfloat16
  assert 0.89 < float(jnp.min(got)) < 0.95 and 1.05 < float(jnp.max(got)) < 1.11
