"""The kernels below the dispatchers: blocks, ragged products, both paths."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.dispatch.registry import DISPATCHERS
from moejax.experts import grouped_matmul as kernels
from moejax.experts.blocks import SMALL_MEAN, cover, make_blocks, sizes_for
from tests.dispatch.suite import DispatcherSuite, make_weights, route, run_experts

_blocks = jax.jit(make_blocks, static_argnums=(1, 2))
LOADS = st.lists(st.integers(0, 700), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(loads=LOADS)
def test_blocks_cover_every_row_exactly_once(loads):
  """Each expert's rows are in its own blocks, once, whatever the loads.

  And the block that runs first of an expert's is marked, and no other.
  """
  sizes = (512, 128, 32)
  loads = [*loads, *([0] * (6 - len(loads)))]  # One shape, one compilation.
  blocks = _blocks(jnp.asarray(loads, jnp.int32), 6 * 700, sizes)
  blocks = jax.tree.map(np.asarray, blocks)
  seen = np.zeros(sum(loads), np.int32)
  owner = np.repeat(np.arange(len(loads)), loads)
  begun = set()
  for z, size in enumerate(sizes):
    for m in range(int(blocks.bound[z]), int(blocks.bound[z + 1])):
      start, count = int(blocks.position[m]), int(blocks.count[m])
      assert 0 < count <= size
      assert np.all(owner[start : start + count] == int(blocks.expert[m]))
      seen[start : start + count] += 1
      assert bool(blocks.first[m]) == (int(blocks.expert[m]) not in begun)
      begun.add(int(blocks.expert[m]))
  assert np.all(seen == 1)


def test_gradients_of_an_expert_of_many_blocks():
  """1,100 rows to one expert, ten to another, none to a third: as by slots."""
  experts = np.where(np.arange(1110) < 1100, 0, 2)
  logits = jax.nn.one_hot(jnp.asarray(experts), 3)[None] * 4.0
  keys = jax.random.split(jax.random.key(1), 2)
  x, weights = (
    jax.random.normal(keys[0], (1, 1110, 2)),
    make_weights(keys[1], 3, 2, 3, "gelu"),
  )
  routing = route(logits, num_selected=1)

  def loss(name, weights):
    y = run_experts(name, x, routing, weights, activation="gelu")
    return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

  got, expected = (
    jax.jit(jax.grad(functools.partial(loss, name)))(weights)
    for name in ("grouped", "gather")
  )
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
  assert not np.any(got.w_in[1]) and np.any(got.w_in[0])


@pytest.mark.parametrize("sizes", [(512, 128, 32), (32, 16), (16,)])
def test_a_cover_is_long_enough_and_wastes_less_than_a_block(sizes):
  """By the table itself: rows >= load, and never a block more than needed."""
  counts = cover(sizes)
  rows = counts @ np.asarray(sizes)
  loads = np.arange(sizes[0] + 1)
  assert np.all(rows >= loads)
  assert not counts[0].any()
  assert np.all(rows <= loads + sizes[0])


@pytest.mark.parametrize("num_experts", [1, 8, 64, 512])
@pytest.mark.parametrize("num_assignments", [1, 24, 4096, 65536])
def test_few_block_sizes_are_compiled(num_assignments, num_experts):
  """Compile time: six loops each way, eight where padding would cost more."""
  sizes = sizes_for(num_assignments, num_experts)
  most = 8 if num_assignments / num_experts <= SMALL_MEAN else 6
  assert 1 <= len(sizes) <= most
  assert list(sizes) == sorted(set(sizes), reverse=True)


def test_rows_behind_the_last_run_are_zero_and_carry_no_gradient():
  """Kernels may leave them unwritten; NaN there must not spread."""
  rows = jnp.full((6, 3), jnp.nan).at[:4].set(1.0)
  stack = jax.random.normal(jax.random.key(0), (2, 3, 5))
  sizes = jnp.asarray([1, 3], jnp.int32)
  out = kernels.grouped_matmul(rows, stack, sizes)
  np.testing.assert_array_equal(out[4:], 0)
  np.testing.assert_allclose(out[0], jnp.sum(stack[0], 0), rtol=1e-5)
  np.testing.assert_allclose(out[1], jnp.sum(stack[1], 0), rtol=1e-5)


def test_without_tokamax_the_fallback_says_why(caplog):
  """On an accelerator: one logged reason, and the product that always exists."""
  kernels.choose.cache_clear()
  with caplog.at_level(logging.WARNING, logger=kernels.__name__):
    name = kernels.choose("gpu")
    assert kernels.choose("gpu") == name
  assert (name == "tokamax") == (not caplog.records)
  if name != "tokamax":
    assert len(caplog.records) == 1
    assert "tokamax" in caplog.records[0].message


class TestGroupedByMatmul(DispatcherSuite):
  """What an accelerator runs passes the same suite, here by ragged_dot."""

  name = "grouped"
  implementation = "ragged_dot"


def _sharded_inputs():
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (4, 8, 6))
  router = jax.random.normal(keys[1], (6, 4))
  return x, router, make_weights(keys[2], 4, 6, 10, "swiglu")


def _loss(name, x, router, weights):
  y = run_experts(name, x, route(x @ router), weights, activation="swiglu")
  return jnp.sum(jnp.square(y))


@pytest.mark.parametrize("name", list(DISPATCHERS))
def test_under_a_sharded_jit(name):
  """The compiler may place things as it likes; gradients stay the same."""
  args = _sharded_inputs()
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec
  grad = jax.grad(functools.partial(_loss, name), argnums=(0, 1, 2))
  want = jax.jit(grad)(*args)
  shard = jax.sharding.NamedSharding(mesh, spec("data"))
  whole = jax.sharding.NamedSharding(mesh, spec())
  got = jax.jit(grad, in_shardings=(shard, whole, whole))(*args)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(DISPATCHERS))
def test_inside_a_checked_shard_map(name):
  """Each device routes its own groups; weights are cast to varying, grads summed."""
  args = _sharded_inputs()
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec
  grad = jax.grad(functools.partial(_loss, name), argnums=(0, 1, 2))

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(spec("data"), spec(), spec()),
    out_specs=(spec("data"), spec(), spec()),
  )
  def local(x, router, weights):
    varying = functools.partial(jax.lax.pcast, axis_name="data", to="varying")
    router, weights = jax.tree.map(varying, (router, weights))
    dx, d_router, d_weights = grad(x, router, weights)
    return dx, *jax.lax.psum((d_router, d_weights), "data")

  want = jax.jit(grad)(*args)
  got = jax.jit(local)(*args)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
