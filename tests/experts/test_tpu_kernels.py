"""Kernels for TPUs, run by Pallas's interpreter, against what a CPU computes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.experts.stack_gradient import order_steps, stack_gradient
from moejax.layers.attend import attention_mask
from moejax.layers.tpu_attention import block_size, tpu_attention

SIZES = ([3, 0, 130, 200, 0], [0, 0], [512], [100, 156], [256, 0, 256], [5, 5, 5], [1])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_stack_gradient(sizes):
  """Every expert's rows^T grad; nothing from behind the last run, NaN included."""
  rng, total = np.random.default_rng(0), sum(sizes)
  num_rows = max(100, -(-total // 128) * 128)
  rows = rng.normal(size=(num_rows, 32)).astype(np.float32)
  grad = rng.normal(size=(num_rows, 48)).astype(np.float32)
  rows[total:], grad[total:] = np.nan, np.nan
  got = stack_gradient(
    jnp.asarray(rows), jnp.asarray(grad), jnp.asarray(sizes, jnp.int32), interpret=True
  )
  ends = np.cumsum(sizes)
  for expert, (size, end) in enumerate(zip(sizes, ends, strict=True)):
    want = rows[end - size : end].T @ grad[end - size : end]
    np.testing.assert_allclose(got[expert], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_steps_visit_every_row_once(sizes):
  """Each (expert, tile) pair that shares a row is visited once, experts in order."""
  tile, num_tiles = 128, max(1, -(-sum(sizes) // 128))
  expert, row_tile, bounds, count = order_steps(jnp.asarray(sizes), num_tiles, tile)
  steps = list(zip(np.asarray(expert), np.asarray(row_tile), strict=True))[: int(count)]
  assert len(set(steps)) == len(steps) and steps == sorted(steps, key=lambda s: s[0])
  for number, (start, end) in enumerate(itertools.pairwise(bounds)):
    tiles = {int(row) // tile for row in range(int(start), int(end))}
    visited = {int(t) for e, t in steps if e == number}
    assert tiles <= visited and len(visited) == max(1, len(tiles))


@pytest.mark.parametrize("window", [0, 40])
def test_attention(window):
  """Two documents and padding, grouped heads: as jax's own attention, with gradients."""
  rng = np.random.default_rng(1)
  shape = {"query": (2, 256, 4, 128), "key": (2, 256, 2, 128), "value": (2, 256, 2, 128)}
  q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shape.values())
  ids = np.ones((2, 256), np.int32)
  ids[0, 100:] = 2
  ids[1, 200:] = 0
  segments = jnp.asarray(ids)
  weights = jnp.asarray(rng.normal(size=shape["query"]), jnp.float32)

  def fused(q, k, v):
    out = tpu_attention(q, k, v, segments, window=window, interpret=True)
    return jnp.sum(out * weights), out

  def plain(q, k, v):
    mask = attention_mask(segments, segments, window=window)
    with jax.numpy_rank_promotion("allow"):
      out = jax.nn.dot_product_attention(q, k, v, mask=mask)
    return jnp.sum(out * weights), out

  got, got_out = jax.jit(jax.grad(fused, (0, 1, 2), has_aux=True))(q, k, v)
  want, want_out = jax.jit(jax.grad(plain, (0, 1, 2), has_aux=True))(q, k, v)
  np.testing.assert_allclose(got_out, want_out, atol=2e-5)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_block_sizes():
  """The largest block that divides the sequence; none where lanes do not."""
  assert [block_size(n) for n in (4096, 768, 384, 100)] == [512, 256, 128, None]
