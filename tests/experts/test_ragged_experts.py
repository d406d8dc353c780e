"""Experts on ragged rows and on slots: in parts, with gates, under rematerialisation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.experts.grouped_matmul import apply_ragged_experts
from moejax.experts.weights import ExpertWeights, apply_in_chunks

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


@pytest.mark.parametrize("chunks", [2, 20])
def test_slots_in_parts(chunks):
  """Parts that do not divide the slots of an expert, with gates and without: the same
  values and gradients, of weights too."""
  rows, gate, weights, target = arrays()
  rows, target = rows.reshape(4, -1, 6), target.reshape(4, -1, 6)
  gate = gate.reshape(4, -1)

  def loss(rows, gate, weights, chunks: int):
    out = apply_in_chunks(rows, weights, "swiglu", gate=gate, chunks=chunks)
    return jnp.sum(out * target), out

  for given in (gate, None):
    which = (0, 1, 2) if given is not None else (0, 2)
    grad = jax.jit(jax.grad(loss, which, has_aux=True), static_argnames="chunks")
    want = grad(rows, given, weights, chunks=1)
    got = grad(rows, given, weights, chunks=chunks)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def stacked(text: str) -> list[tuple[int, ...]]:
  """Returns the shapes of a program's arrays that are as long as there are parts."""
  shapes = re.findall(r"f32\[(\d+(?:,\d+)*)\]", text)
  return [s for s in (tuple(map(int, s.split(","))) for s in shapes) if s[0] == 7]


def test_parts_keep_no_copies_of_the_weights():
  """Seven parts: what they stack are rows and gates, no [7, E, D, F] or [7, E, F, D]."""
  rows, gate, weights, target = arrays()

  def slots(rows, gate, weights):
    rows, gate = rows.reshape(4, -1, 6), gate.reshape(4, -1)
    out = apply_in_chunks(rows, weights, "swiglu", gate=gate, chunks=7)
    return jnp.sum(out * target.reshape(4, -1, 6))

  def ragged(rows, gate, weights):
    return loss(rows, gate, weights, target, 7)[0]

  for function in (slots, ragged):
    grad = jax.jit(jax.grad(function, (0, 1, 2)))
    text = grad.lower(rows, gate, weights).compile().as_text()
    assert text
    found = stacked(text)
    assert found and not [s for s in found if s[1:] in ((4, 6, 8), (4, 8, 6))]
