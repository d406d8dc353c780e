"""The ends of the model on a mesh that cuts vocabulary, width and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moejax.config import MeshConfig
from moejax.sharding import vocabulary
from moejax.sharding.mesh import TOKEN_AXES, make_mesh

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(24, 8)).astype(np.float32)
TOKENS = RNG.integers(0, 24, (8, 5)).astype(np.int32)
WEIGHTS = RNG.normal(size=(8, 5, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))


def test_lookup(mesh):
  """As indexing a whole table, and so is the gradient, which adds up over devices."""

  def loss(table, tokens, weights):
    rows = vocabulary.lookup(table, tokens, jnp.float32)
    return jnp.sum(rows * weights), rows

  place = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
  by_token = NamedSharding(mesh, PartitionSpec(TOKEN_AXES))
  with jax.set_mesh(mesh):
    arguments = (
      jax.device_put(TABLE, place),
      *(jax.device_put(a, by_token) for a in (TOKENS, WEIGHTS)),
    )
    grad, rows = jax.jit(jax.grad(loss, has_aux=True))(*arguments)
  np.testing.assert_array_equal(rows, TABLE[TOKENS])
  want = np.zeros_like(TABLE)
  np.add.at(want, TOKENS, WEIGHTS)
  np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-5)
  assert grad.sharding.is_equivalent_to(place, 2)


def test_score(mesh):
  """As a plain product, with its gradients."""
  head = TABLE.T

  def loss(x, head):
    return jnp.sum(jnp.square(vocabulary.score(x, head)))

  places = (PartitionSpec(TOKEN_AXES), PartitionSpec("fsdp", "tensor"))
  with jax.set_mesh(mesh):
    arguments = [
      jax.device_put(a, NamedSharding(mesh, p))
      for a, p in zip((WEIGHTS, head), places, strict=True)
    ]
    logits = jax.jit(vocabulary.score)(*arguments)
    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(*arguments)
  np.testing.assert_allclose(logits, WEIGHTS @ head, rtol=1e-5, atol=1e-5)
  residual = 2 * (WEIGHTS @ head)
  np.testing.assert_allclose(got[0], residual @ head.T, rtol=1e-4, atol=1e-4)
  want = np.einsum("bsd,bsv->dv", WEIGHTS, residual)
  np.testing.assert_allclose(got[1], want, rtol=1e-4, atol=1e-4)
  assert got[1].sharding.is_equivalent_to(arguments[1].sharding, 2)


def test_a_batch_that_devices_cannot_share(mesh):
  """Evaluation of a few sequences: every device looks up all of them."""
  with jax.set_mesh(mesh):
    rows = jax.jit(lambda t, i: vocabulary.lookup(t, i, jnp.float32))(TABLE, TOKENS[:3])
  np.testing.assert_array_equal(rows, TABLE[TOKENS[:3]])


@pytest.mark.parametrize(("fsdp", "gathers"), [(1, 0), (2, 1)])
def test_only_what_is_cut_is_gathered(fsdp, gathers):
  """On one device of an axis there is nothing to move, nor in the backward pass."""

  def loss(x, head):
    return jnp.sum(jnp.square(vocabulary.score(x, head)))

  with jax.set_mesh(make_mesh(MeshConfig(data=-1, fsdp=fsdp))):
    text = jax.jit(jax.grad(loss, argnums=1)).lower(WEIGHTS, TABLE.T).as_text()
  assert text.count("stablehlo.all_gather") == gathers
  assert text.count("stablehlo.reduce_scatter") == gathers
