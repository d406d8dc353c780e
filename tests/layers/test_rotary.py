"""Rotary positions: each kind against its formula, written out in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ModelConfig
from moejax.layers.rotary import logit_scale, make_rotary

POSITIONS = np.array([[0, 1, 5, 40], [3, 2, 1, 100]])
A = 16
X = np.random.default_rng(0).normal(size=(2, 4, 3, A))


def rotate(x, frequencies, *, interleaved=False, factor=1.0):
  """Multiplies each pair, as a complex number, by factor * exp(i * position * f)."""
  count = len(frequencies)
  pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + count) for i in range(count)]
  out = x.copy()
  for (a, b), frequency in zip(pairs, frequencies, strict=True):
    turn = factor * np.exp(1j * POSITIONS * frequency)[:, :, None]
    z = (x[..., a] + 1j * x[..., b]) * turn
    out[..., a], out[..., b] = z.real, z.imag
  return out


def ours(**fields):
  config = ModelConfig(num_heads=1, width=A, **fields)
  got = make_rotary(config)(
    jnp.asarray(X, jnp.float32), jnp.asarray(POSITIONS, jnp.int32)
  )
  return np.asarray(got)


def plain(count=A // 2, theta=1e4):
  return [theta ** (-i / count) for i in range(count)]


def turns(frequency, original):
  """How often a pair turns in the original context."""
  return original * frequency / (2 * math.pi)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_pairs_turn_and_the_rest_of_a_head_passes(interleaved, fraction):
  """Both ways of pairing; of half a head, the first half turns at its own frequencies."""
  size = int(A * fraction)
  expected = X.copy()
  expected[..., :size] = rotate(X[..., :size], plain(size // 2), interleaved=interleaved)
  got = ours(rope_fraction=fraction, rope_interleaved=interleaved)
  np.testing.assert_allclose(got, expected, atol=2e-5)
  np.testing.assert_array_equal(got[..., size:], np.float32(X[..., size:]))


def test_linear_scaling_divides_positions():
  """Position 40 at factor 4 turns as position 10 did."""
  expected = rotate(X, [f / 4 for f in plain()])
  got = ours(rope_scaling="linear", rope_factor=4.0)
  np.testing.assert_allclose(got, expected, atol=2e-5)


def test_llama3_keeps_fast_pairs_divides_slow_ones_and_blends_between():
  """With low 1, high 4 and an original context of 64, all three cases occur."""
  frequencies, kinds = [], set()
  for f in plain():
    wavelength = 2 * math.pi / f
    if wavelength < 64 / 4:
      kinds.add("kept")
      frequencies.append(f)
    elif wavelength > 64 / 1:
      kinds.add("divided")
      frequencies.append(f / 8)
    else:
      kinds.add("blended")
      smooth = (64 / wavelength - 1) / (4 - 1)
      frequencies.append((1 - smooth) * f / 8 + smooth * f)
  assert kinds == {"kept", "divided", "blended"}
  got = ours(
    rope_scaling="llama3", rope_factor=8.0, rope_original=64, rope_high_factor=4.0
  )
  np.testing.assert_allclose(got, rotate(X, frequencies), atol=2e-5)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_ramps_over_the_index_of_a_pair(truncate):
  """The ramp begins at the pair that turns beta_fast times and ends at beta_slow's.

  Solved for the index by bisection on the number of turns, not by the logarithm of the
  formula.
  """
  original, fast, slow, factor = 2048, 32.0, 2.0, 4.0

  def index_of(count):
    low, high = 0.0, float(A)
    for _ in range(100):
      middle = (low + high) / 2
      faster = turns(1e4 ** (-2 * middle / A), original) > count
      low, high = (middle, high) if faster else (low, middle)
    return low

  start, end = index_of(fast), index_of(slow)
  if truncate:
    start, end = math.floor(start), math.ceil(end)
  assert 0 < start < end < A // 2
  frequencies = []
  for i, f in enumerate(plain()):
    ramp = min(max((i - start) / (end - start), 0), 1)
    frequencies.append((1 - ramp) * f + ramp * f / factor)
  assert frequencies[0] == 1.0 and frequencies[-1] == plain()[-1] / factor
  got = ours(
    rope_scaling="yarn",
    rope_factor=factor,
    rope_original=original,
    rope_beta_slow=slow,
    rope_truncate=truncate,
  )
  expected = rotate(X, frequencies, factor=0.1 * math.log(4) + 1)
  np.testing.assert_allclose(got, expected, atol=5e-5)


def test_yarns_temperature_is_split_between_rotation_and_logits():
  """DeepSeek-V2: mscale .707 of 40, all of it on the logits; 1/sqrt(A) without."""
  config = ModelConfig(
    num_heads=1, width=A, rope_scaling="yarn", rope_factor=40.0, rope_original=4096
  )
  temperature = 0.1 * math.log(40) + 1
  assert make_rotary(config).factor == pytest.approx(temperature)
  assert logit_scale(config) is None
  config.rope_mscale = config.rope_mscale_all_dim = 0.707
  moved = 0.1 * 0.707 * math.log(40) + 1
  assert make_rotary(config).factor == 1.0
  assert logit_scale(config) == pytest.approx(moved**2 / math.sqrt(A))
  config.rope_mscale = 1.0
  assert make_rotary(config).factor == pytest.approx(temperature / moved)
  config.rope_attention_factor = 1.25
  assert make_rotary(config).factor == 1.25


def test_granites_scale_replaces_the_square_root():
  config = ModelConfig(num_heads=1, width=A, attention_scale=0.3)
  assert logit_scale(config) == 0.3
