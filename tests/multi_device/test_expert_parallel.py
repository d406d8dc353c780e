"""The same numbers on every mesh, however tokens travel: one MoE layer, 8 devices.

Routing groups are set by the config and not by the device count, so what is dropped,
the loads, the losses and all gradients must be those of one device.
"""

import contextlib
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import Config, MeshConfig, ModelConfig, MoEConfig
from moejax.config.check import validate
from moejax.config.devices import validate_devices
from moejax.dispatch.registry import DISPATCHERS
from moejax.errors import ConfigError
from moejax.exchange.run import EXCHANGES
from moejax.layers.moe import MoE
from moejax.models.shell import Shell
from moejax.sharding import rules
from moejax.sharding.mesh import make_mesh

B, S, D, E = 8, 8, 8, 8
MODEL = ModelConfig(num_layers=2, width=D, num_heads=2, activation="swiglu")
MESHES = {
  "data 8": MeshConfig(data=8),
  "expert 8": MeshConfig(data=1, expert=8),
  "expert 4 x data 2": MeshConfig(data=2, expert=4),
  "expert 2 x fsdp 2 x tensor 2": MeshConfig(data=1, expert=2, fsdp=2, tensor=2),
  "fsdp 8": MeshConfig(data=1, fsdp=8),
}
K = {"switch": 1, "top2": 2, "top_k": 4, "sigmoid_bias": 2, "expert_choice": 2, "soft": 1}
USERS: dict[str, Any] = {"xla_backend_optimization_level": 3}
"""What a run compiles with; the tests' own level is 0."""


def make(
  router: str, factor: float | None, model: ModelConfig = MODEL, **changes
) -> Shell:
  fields = {
    "num_experts": E,
    "num_selected": K[router],
    "hidden": 8,
    "num_shared": 1,
    "router": router,
    "capacity_factor": factor,
    "balance_scope": "batch",
    "router_init_scale": 3.0,
    "group_size": S if router == "soft" else 0,
  }
  moe = MoEConfig(**(fields | changes))
  return Shell(lambda key: MoE(model, moe, nnx.Rngs(params=key)))


def inputs(dtype: str = "float32"):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(B, S, D)), dtype)
  valid = np.arange(S)[None, :] < rng.integers(S // 2, S + 1, (B, 1))
  weight = jnp.asarray(rng.normal(size=(B, S, D)), dtype)
  return x, valid, weight


def compute(
  shell: Shell,
  factor: float | None,
  mesh_config: MeshConfig,
  devices: int,
  dtype: str = "float32",
  options: dict[str, Any] | None = None,
):
  """Output, losses, stats, and gradients of all parameters and of the input."""
  with prepared(shell, factor, mesh_config, devices, dtype) as (step, arguments):
    if options:
      step = step.lower(*arguments).compile(options)
    return jax.device_get(step(*arguments))


@contextlib.contextmanager
def prepared(
  shell: Shell,
  factor: float | None,
  mesh_config: MeshConfig,
  devices: int,
  dtype: str = "float32",
):
  """What `compute` calls, and with what, on its mesh."""
  mesh = make_mesh(mesh_config, jax.devices()[:devices])
  x, valid, weight = inputs(dtype)

  def call(params, x, valid, weight):
    def total(params, x):
      ids = jnp.zeros(valid.shape, jnp.int32)
      y, aux = shell.merge(params)(
        x, valid, ids, key=jax.random.key(3), train=True, capacity_factor=factor
      )
      loss = jnp.sum((y * weight).astype(jnp.float32)) + sum(aux.losses.values())
      return loss, (y, aux.losses, aux.stats, aux.served)

    grads, out = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
    return out, grads

  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(shell.init, jax.random.key(0))
    placed = rules.shardings(mesh, shell.axes, shapes)
    tokens = rules.batch_sharding(mesh)
    params = jax.device_put(shell.init(jax.random.key(0)), placed)
    x, valid, weight = jax.device_put((x, valid, weight), tokens)
    step = jax.jit(call, in_shardings=(placed, tokens, tokens, tokens))
    yield step, (params, x, valid, weight)


@functools.cache
def on_one_device(router: str, factor: float | None, dtype: str = "float32"):
  return compute(make(router, factor), factor, MeshConfig(data=1), 1, dtype)


def check(
  router: str,
  factor: float | None,
  mesh: str,
  dtype: str = "float32",
  options: dict[str, Any] | None = None,
  **changes,
):
  shell = make(router, factor, **changes)
  there = compute(shell, factor, MESHES[mesh], 8, dtype, options)
  (y, losses, stats, _), grads = there
  (y1, losses1, stats1, _), grads1 = on_one_device(router, factor, dtype)
  exact, value, gradient = TOLERANCE[dtype]
  for name in ("chosen", "load", "dropped_tokens"):
    got, want = getattr(stats, name), getattr(stats1, name)
    np.testing.assert_allclose(got, want, rtol=exact, err_msg=name)
  np.testing.assert_array_equal(np.any(y != 0, -1), np.any(y1 != 0, -1))
  near(y, y1, value)
  for name in losses1:
    np.testing.assert_allclose(losses[name], losses1[name], rtol=1e-5)
  for one, other in zip(jax.tree.leaves(grads1), jax.tree.leaves(grads), strict=True):
    near(other, one, gradient)
  assert stats.lost is None or stats.lost == 0
  return stats1


TOLERANCE = {"float32": (0, 1e-5, 1e-4), "bfloat16": (0, 0.02, 0.03)}
"""Of counts; of values and of gradients, relative to the largest of an array."""


def near(got, want, tolerance: float) -> None:
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  np.testing.assert_allclose(got, want, atol=tolerance * max(np.abs(want).max(), 1e-30))


CASES = [
  ("top_k", 1.0, "fsdp 8", "auto", "einsum", "bfloat16"),
  ("top2", None, "expert 4 x data 2", "ragged", "grouped", "bfloat16"),
  ("sigmoid_bias", None, "expert 2 x fsdp 2 x tensor 2", "ring", "einsum", "float32"),
  ("soft", 1.0, "data 8", "all_to_all", "auto", "float32"),
  ("switch", None, "expert 8", "auto", "gather", "float32"),
  ("expert_choice", 1.0, "expert 8", "gspmd", "auto", "bfloat16"),
  ("top2", 1.0, "expert 2 x fsdp 2 x tensor 2", "ring", "gather", "bfloat16"),
  ("top2", None, "fsdp 8", "gspmd", "auto", "float32"),
  ("sigmoid_bias", 1.0, "expert 4 x data 2", "auto", "grouped", "float32"),
  ("switch", 1.0, "data 8", "ragged", "einsum", "bfloat16"),
  ("top_k", None, "expert 2 x fsdp 2 x tensor 2", "ragged", "auto", "float32"),
  ("sigmoid_bias", 1.0, "fsdp 8", "all_to_all", "gather", "bfloat16"),
  ("top_k", None, "data 8", "ring", "grouped", "bfloat16"),
  ("soft", 1.0, "expert 4 x data 2", "gspmd", "einsum", "bfloat16"),
  ("expert_choice", 1.0, "data 8", "ragged", "gather", "float32"),
  ("switch", None, "expert 4 x data 2", "ring", "auto", "bfloat16"),
  ("top2", 1.0, "expert 8", "all_to_all", "einsum", "bfloat16"),
  ("top_k", 1.0, "expert 4 x data 2", "all_to_all", "gather", "float32"),
  ("expert_choice", 1.0, "expert 2 x fsdp 2 x tensor 2", "auto", "grouped", "float32"),
  ("switch", 1.0, "fsdp 8", "all_to_all", "grouped", "bfloat16"),
  ("sigmoid_bias", None, "data 8", "gspmd", "auto", "float32"),
  ("sigmoid_bias", None, "expert 8", "ragged", "grouped", "float32"),
  ("top2", None, "data 8", "auto", "auto", "bfloat16"),
  ("expert_choice", 1.0, "fsdp 8", "ring", "einsum", "bfloat16"),
  ("switch", None, "expert 2 x fsdp 2 x tensor 2", "gspmd", "einsum", "bfloat16"),
  ("soft", 1.0, "fsdp 8", "ragged", "auto", "float32"),
  ("soft", 1.0, "expert 8", "ring", "einsum", "float32"),
  ("expert_choice", 1.0, "expert 4 x data 2", "all_to_all", "einsum", "bfloat16"),
  ("top_k", None, "expert 8", "gspmd", "auto", "float32"),
  ("soft", 1.0, "expert 2 x fsdp 2 x tensor 2", "all_to_all", "einsum", "float32"),
  ("soft", 1.0, "expert 8", "auto", "einsum", "bfloat16"),
]
"""Router, capacity factor, mesh, exchange, dispatcher, dtype: every two values that can
go together do, in some case; the test below counts them. The first ones, which have most
pairs, are fast tests."""


@pytest.mark.parametrize(
  ("router", "factor", "mesh", "exchange", "dispatcher", "dtype"),
  [c if c in CASES[:7] else pytest.param(*c, marks=pytest.mark.slow) for c in CASES],
)
def test_every_mesh_gives_the_numbers_of_one_device(
  router, factor, mesh, exchange, dispatcher, dtype
):
  """Drop decisions exactly, values to 1e-5, gradients to 1e-4 (in float32); every fourth
  case as users compile it."""
  case = (router, factor, mesh, exchange, dispatcher, dtype)
  options = USERS if CASES.index(case) % 4 == 0 else None
  stats = check(*case[:3], dtype, options, exchange=exchange, dispatcher=dispatcher)
  if factor is not None and router not in ("expert_choice", "soft"):
    assert stats.load.sum() < stats.chosen.sum()  # Something was dropped.


@pytest.mark.slow
def test_every_two_values_that_go_together_are_tested_together():
  """Two values go together if some whole case with both of them is not refused."""
  values = [dict.fromkeys(column) for column in zip(*CASES, strict=True)]
  assert set(values[3]) == {"auto", "gspmd", *EXCHANGES} - {"none"}
  assert set(values[4]) == {"auto", *DISPATCHERS}
  possible = set()
  for case in itertools.product(*values):
    if not pairs(case) <= possible and runs(*case[:5]):
      possible |= pairs(case)
  assert possible == set().union(*map(pairs, CASES))


def pairs(case: tuple) -> set[tuple]:
  return set(itertools.combinations(enumerate(case), 2))


def runs(
  router: str, factor: float | None, mesh: str, exchange: str, dispatcher: str
) -> bool:
  """Whether the config is accepted, by the checks that every program makes."""
  config = Config(mesh=MESHES[mesh])
  config.data.sequence_length = S
  config.train.batch_size = B
  config.moe = MoEConfig(
    num_experts=E,
    num_selected=K[router],
    router=router,
    capacity_factor=factor,
    eval_capacity_factor=factor,
    group_size=S if router == "soft" else 0,
    exchange=exchange,
    dispatcher=dispatcher,
  )
  try:
    validate(config)
    validate_devices(config, 8)
  except ConfigError:
    return False
  return True


def test_pieces_change_nothing():
  """Slots that travel in three pieces, of unequal size, are the same slots."""
  mesh = "expert 4 x data 2"
  check("top2", 1.0, mesh, exchange="all_to_all", exchange_chunks=3)


@pytest.mark.parametrize(
  ("router", "mesh"),
  [
    ("top2", "expert 4 x data 2"),
    pytest.param("expert_choice", "expert 2 x fsdp 2 x tensor 2", marks=pytest.mark.slow),
  ],
)
def test_gates_that_travel_with_slots_change_nothing(router, mesh):
  """As they do under recomputation, in pieces too: hidden activations are weighted, and
  with them the bias of each expert, instead of the outputs of one device."""
  how: dict[str, Any] = dict(
    exchange="all_to_all", dispatcher="gather", exchange_chunks=3, expert_bias=True
  )
  shell = make(router, 1.0, dataclasses.replace(MODEL, remat="all"), **how)
  (y, _, stats, _), grads = compute(shell, 1.0, MESHES[mesh], 8)
  (y1, _, stats1, _), grads1 = compute(shell, 1.0, MeshConfig(data=1), 1)
  near(y, y1, 1e-5)
  np.testing.assert_array_equal(stats.load, stats1.load)
  for one, other in zip(jax.tree.leaves(grads1), jax.tree.leaves(grads), strict=True):
    near(other, one, 1e-4)


@pytest.mark.parametrize("router", ["top2", "expert_choice"])
def test_groups_sent_in_parts_give_the_same_numbers(router):
  """Two groups a device, one after the other, each with room for any load of its own:
  values, statistics and gradients are those of one device, where nothing is sent."""
  factor = None if router == "top2" else 1.0
  how: dict[str, Any] = dict(exchange="ragged", dispatcher="grouped", group_size=S // 2)
  one = compute(make(router, factor, **how), factor, MeshConfig(data=1), 1)
  parts = make(router, factor, exchange_chunks=2, **how)
  for got in (parts, make(router, factor, exchange_chunks=3, **how)):
    (y, _, stats, _), grads = compute(got, factor, MESHES["expert 4 x data 2"], 8)
    near(y, one[0][0], 1e-5)
    np.testing.assert_array_equal(stats.load, one[0][2].load)
    assert stats.lost == 0
    for mine, other in zip(jax.tree.leaves(grads), jax.tree.leaves(one[1]), strict=True):
      near(mine, other, 1e-4)


def test_what_a_bounded_buffer_cannot_hold_is_counted():
  """With room for half of all tokens' assignments, half of them at most are computed.

  Computed and lost ones add up to those of an unbounded buffer.
  """
  shell = make("top2", None, exchange="ragged", exchange_buffer=0.5)
  (y, _, stats, _), _ = compute(shell, None, MESHES["expert 4 x data 2"], 8)
  (y1, _, stats1, _), _ = on_one_device("top2", None)
  assert stats.load.sum() <= 0.5 * B * S * K["top2"] < stats1.load.sum()
  assert stats.lost + stats.load.sum() == stats1.load.sum()
  assert np.isfinite(y).all() and not np.allclose(y, y1)


def test_a_token_whose_assignments_are_all_lost_on_the_way_is_a_dropped_token():
  """Without shared experts such a token's output is exactly zero, as a drop's is; the
  count is of those, padding left out, on the device that sent them."""
  shell = make("top2", None, exchange="ragged", exchange_buffer=0.25, num_shared=0)
  (y, _, stats, _), _ = compute(shell, None, MESHES["expert 4 x data 2"], 8)
  _, valid, _ = inputs()
  zero = (y == 0).all(-1)
  assert stats.dropped_tokens == (zero & valid).sum() > 0
  # Some of the others have lost one of their two experts.
  assert stats.lost > 2 * stats.dropped_tokens


def test_an_exchange_that_cannot_carry_the_routing_is_refused():
  """Slots for dropless; groups that do not divide over the devices."""
  with pytest.raises(ConfigError, match="dropless has none"):
    shell = make("top2", None, exchange="all_to_all")
    compute(shell, None, MESHES["expert 8"], 8)
  with pytest.raises(ConfigError, match="1 routing groups do not divide evenly over 8"):
    shell = make("top2", 1.0, exchange="ring", group_size=-1)
    compute(shell, 1.0, MESHES["expert 8"], 8)


def test_one_group_for_the_batch_falls_to_the_compiler():
  """group_size=-1 and auto: gspmd, with the numbers of one device."""
  out = [
    compute(make("top2", 1.0, group_size=-1), 1.0, mesh, devices)
    for mesh, devices in ((MeshConfig(data=1), 1), (MESHES["expert 4 x data 2"], 8))
  ]
  np.testing.assert_array_equal(out[1][0][2].load, out[0][0][2].load)
  np.testing.assert_allclose(out[1][0][0], out[0][0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mesh", "gathers"), [("expert 4 x data 2", 0), ("fsdp 8", 3)])
def test_weights_are_gathered_only_where_they_are_cut(mesh, gathers):
  """A gather from one device costs copies: three matrices over fsdp, or none."""
  shell = make("switch", 1.25, exchange="auto")
  with prepared(shell, 1.25, MESHES[mesh], 8) as (step, arguments):
    lines = step.lower(*arguments).as_text().splitlines()
  found = [line for line in lines if "stablehlo.all_gather" in line]
  experts = [line for line in found if line.endswith(f"tensor<{E}x{D}x{D}xf32>")]
  assert len(experts) == gathers
