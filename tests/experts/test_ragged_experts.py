"""Experts on ragged rows: in parts, with gates, under rematerialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.experts.grouped_matmul import apply_ragged_experts
from moejax.experts.weights import ExpertWeights

SIZES = np.array([3, 0, 9, 5], np.int32)
ROWS = 20
"""Three of them behind the last run."""


def arrays():
  rng = np.random.default_rng(0)

  def normal(*size: int):
    return jnp.asarray(rng.normal(size=size), jnp.float32)

  weights = ExpertWeights(
    w_in=normal(4, 6, 8), w_out=normal(4, 8, 6), w_gate=normal(4, 6, 8)
  )
  return normal(ROWS, 6), normal(ROWS), weights, normal(ROWS, 6)


def loss(rows, gate, weights, target, chunks: int):
  out = apply_ragged_experts(
    rows, jnp.asarray(SIZES), weights, "swiglu", gate=gate, chunks=chunks
  )
  return jnp.sum(out * target), out


def test_gates_weigh_the_output():
  """A gate on the hidden activations is a gate on the output."""
  rows, gate, weights, target = arrays()
  _, gated = loss(rows, gate, weights, target, 1)
  _, plain = loss(rows, None, weights, target, 1)
  np.testing.assert_allclose(gated, plain * gate[:, None], rtol=1e-4, atol=1e-4)
  assert not np.any(gated[SIZES.sum() :])


@pytest.mark.parametrize("chunks", [2, 3, 20])
def test_in_parts(chunks):
  """Parts that cut through runs, and do not divide the rows: the same values and
  gradients, of weights too, which add up over parts."""
  rows, gate, weights, target = arrays()
  grad = jax.jit(
    jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnames="chunks"
  )
  want, want_out = grad(rows, gate, weights, target, chunks=1)
  got, got_out = grad(rows, gate, weights, target, chunks=chunks)
  np.testing.assert_allclose(got_out, want_out, rtol=1e-4, atol=1e-4)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
