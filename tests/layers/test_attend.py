"""Softmax attention: sinks, value widths and windows against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.layers import attend as attend_module
from moejax.layers.attend import Context, attend, attention_mask
from moejax.layers.tpu_attention import tpu_attention

B, S, H, J, A = 2, 7, 4, 2, 6


def draw(value_width=A, length=S, width=A):
  rng = np.random.default_rng(0)
  shapes = ((B, length, H, width), (B, length, J, width), (B, length, J, value_width))
  arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
  return (*arrays, jnp.asarray(rng.normal(size=H), jnp.float32))


def make_context(length=S, window=0):
  segments = np.ones((B, length), np.int32)
  segments[0, length // 2 :], segments[1, -2:] = 2, 0
  segments = jnp.asarray(segments)
  return Context(
    positions=jnp.zeros((B, length), jnp.int32),
    mask=attention_mask(segments, segments, window=window),
    segment_ids=segments,
  )


def reference(query, key, value, mask, scale, sinks):
  """Token by token and head by head; a sink is one more logit, without a value."""
  query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
  out = np.zeros((*query.shape[:3], value.shape[-1]))
  for b, s, h in np.ndindex(*query.shape[:3]):
    seen = np.flatnonzero(np.asarray(mask)[b, 0, s])
    j = h // (query.shape[2] // key.shape[2])
    logits = [scale * query[b, s, h] @ key[b, m, j] for m in seen]
    extra = [] if sinks is None else [float(sinks[h])]
    weights = np.exp(np.array(logits + extra))
    weights /= weights.sum()
    out[b, s, h] = weights[: len(seen)] @ value[b, seen, j]
  return out


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("value_width", [A, 3, 9])
def test_values(with_sinks, value_width):
  """Grouped heads, two documents and padding, a window, a scale of its own."""
  query, key, value, sinks = draw(value_width)
  sinks = sinks if with_sinks else None
  context = make_context(window=3)
  run = jax.jit(lambda q, k, v: attend(q, k, v, context, scale=0.7, sinks=sinks))
  got = run(query, key, value)
  want = reference(query, key, value, context.mask, 0.7, sinks)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_gradients_are_finite_differences():
  """Of queries, keys, values and sinks, along random directions; a step of 1e-2."""
  args, context = draw(3), make_context()

  @jax.jit
  def loss(query, key, value, sinks):
    out = attend(query, key, value, context, sinks=sinks)
    return jnp.sum(jnp.sin(3 * out))

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*args)
  rng = np.random.default_rng(1)
  for i, own in enumerate(gradient):
    direction = jnp.asarray(rng.normal(size=own.shape), jnp.float32)
    direction /= jnp.linalg.norm(direction)

    def moved(step, i=i, direction=direction):
      return [a + step * direction if k == i else a for k, a in enumerate(args)]

    difference = (loss(*moved(1e-2)) - loss(*moved(-1e-2))) / 2e-2
    np.testing.assert_allclose(jnp.sum(own * direction), difference, rtol=2e-2, atol=2e-3)


def test_a_low_sink_takes_nothing_and_a_high_one_all():
  """The weights over the tokens sum to 1 - the sink's: to 1, and to 0."""
  query, key, value, _ = draw()
  context = make_context()
  without = attend(query, key, value, context)
  for logit, share in ((-80.0, 1.0), (80.0, 0.0)):
    got = attend(query, key, value, context, sinks=jnp.full(H, logit))
    np.testing.assert_allclose(got, share * without, atol=1e-6)


@pytest.mark.parametrize("window", [0, 40])
def test_the_kernel_for_tpus_has_sinks_scales_and_narrower_values(window):
  """Interpreted on the CPU; in value and gradient, as the attention above."""
  args = draw(128, length=256, width=192)
  context = make_context(256, window)
  weights = jnp.asarray(np.random.default_rng(2).normal(size=args[2].shape[-1]))

  def plain(query, key, value, sinks):
    return attend(query, key, value, context, scale=0.05, sinks=sinks)

  def fused(query, key, value, sinks):
    options = {"window": window, "scale": 0.05, "interpret": True}
    return tpu_attention(query, key, value, context.segment_ids, sinks, **options)

  def loss(function, *args):
    out = function(*args)
    return jnp.sum(out * weights.astype(out.dtype)[None, None, None]), out

  both = [
    jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2, 3), has_aux=True))(*args)
    for f in (fused, plain)
  ]
  for got, want in zip(*(jax.tree.leaves(b) for b in both), strict=True):
    np.testing.assert_allclose(got, want, atol=3e-4)


def test_cudnn_is_asked_for_what_it_can(monkeypatch):
  """Half precision, widths of multiples of 8 up to 128 where no Hopper is seen."""
  monkeypatch.setattr(attend_module, "target_is_nvidia", lambda: True)
  choose = attend_module._implementation
  half, single = jnp.dtype("bfloat16"), jnp.dtype("float32")
  assert [choose(half, width) for width in (64, 128)] == ["cudnn"] * 2
  assert [choose(half, width) for width in (36, 192, 576)] == [None] * 3
  assert choose(single, 64) is None
