"""The same numbers on every mesh, however tokens travel: one MoE layer, 8 devices.

Routing groups are set by the config and not by the device count, so what is dropped,
the loads, the losses and all gradients must be those of one device.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import Config, MeshConfig, ModelConfig, MoEConfig
from moejax.config.devices import validate_devices
from moejax.errors import ConfigError
from moejax.layers.moe import MoE
from moejax.models.stack import Shell
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
K = {"switch": 1, "top2": 2, "top_k": 4, "sigmoid_bias": 2, "expert_choice": 2}
EXCHANGES = ("all_to_all", "ragged", "ring", "gspmd")


def make(router: str, factor: float | None, **changes) -> Shell:
  fields = {
    "num_experts": E,
    "num_selected": K[router],
    "hidden": 8,
    "num_shared": 1,
    "router": router,
    "capacity_factor": factor,
    "balance_scope": "batch",
    "router_init_scale": 3.0,
  }
  moe = MoEConfig(**(fields | changes))
  return Shell(lambda key: MoE(MODEL, moe, nnx.Rngs(params=key)))


def inputs():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(B, S, D)).astype(np.float32)
  valid = np.arange(S)[None, :] < rng.integers(S // 2, S + 1, (B, 1))
  weight = rng.normal(size=(B, S, D)).astype(np.float32)
  return x, valid, weight


def compute(shell: Shell, factor: float | None, mesh_config: MeshConfig, devices: int):
  """Output, losses, stats, and gradients of all parameters and of the input."""
  with prepared(shell, factor, mesh_config, devices) as (step, arguments):
    return jax.device_get(step(*arguments))


@contextlib.contextmanager
def prepared(shell: Shell, factor: float | None, mesh_config: MeshConfig, devices: int):
  """What `compute` calls, and with what, on its mesh."""
  mesh = make_mesh(mesh_config, jax.devices()[:devices])
  x, valid, weight = inputs()

  def call(params, x, valid, weight):
    def total(params, x):
      ids = jnp.zeros(valid.shape, jnp.int32)
      y, aux = shell.merge(params)(
        x, valid, ids, key=jax.random.key(3), train=True, capacity_factor=factor
      )
      loss = jnp.sum(y * weight) + sum(aux.losses.values())
      return loss, (y, aux.losses, aux.stats, aux.served)

    grads, out = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
    return out, grads

  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(shell.init, jax.random.key(0))
    placed = rules.shardings(mesh, shell.axes, shapes)
    tokens = rules.batch_sharding(mesh)
    params = jax.device_put(shell.init(jax.random.key(0)), placed)
    step = jax.jit(call, in_shardings=(placed, tokens, tokens, tokens))
    yield step, (params, x, valid, weight)


@functools.cache
def on_one_device(router: str, factor: float | None):
  return compute(make(router, factor), factor, MeshConfig(data=1), 1)


def check(router: str, factor: float | None, mesh: str, exchange: str, **changes):
  shell = make(router, factor, exchange=exchange, **changes)
  (y, losses, stats, _), grads = compute(shell, factor, MESHES[mesh], 8)
  (y1, losses1, stats1, _), grads1 = on_one_device(router, factor)
  np.testing.assert_array_equal(stats.chosen, stats1.chosen)
  np.testing.assert_array_equal(stats.load, stats1.load)
  np.testing.assert_array_equal(stats.dropped_tokens, stats1.dropped_tokens)
  np.testing.assert_array_equal(np.any(y != 0, -1), np.any(y1 != 0, -1))
  np.testing.assert_allclose(y, y1, rtol=1e-5, atol=1e-5)
  for name, value in losses1.items():
    np.testing.assert_allclose(losses[name], value, rtol=1e-5)
  for one, other in zip(jax.tree.leaves(grads1), jax.tree.leaves(grads), strict=True):
    scale = np.max(np.abs(one))
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5 * scale)
  assert stats.lost is None or stats.lost == 0
  return stats1


MATRIX = [
  case
  for case in itertools.product(K, (1.0, None), MESHES, EXCHANGES)
  if not (case[1] is None and (case[3] == "all_to_all" or case[0] == "expert_choice"))
]
FAST = {
  ("switch", 1.0, "expert 8", "all_to_all"),
  ("top_k", 1.0, "expert 2 x fsdp 2 x tensor 2", "all_to_all"),
  ("expert_choice", 1.0, "expert 4 x data 2", "all_to_all"),
  ("top_k", None, "expert 2 x fsdp 2 x tensor 2", "ragged"),
  ("sigmoid_bias", None, "expert 4 x data 2", "ragged"),
  ("top2", None, "expert 4 x data 2", "ring"),
  ("top2", 1.0, "expert 4 x data 2", "gspmd"),
  ("top2", 1.0, "fsdp 8", "all_to_all"),
}
"""Every exchange and every router once; the others nightly."""


@pytest.mark.parametrize(
  ("router", "factor", "mesh", "exchange"),
  [c if c in FAST else pytest.param(*c, marks=pytest.mark.slow) for c in MATRIX],
)
def test_every_mesh_gives_the_numbers_of_one_device(router, factor, mesh, exchange):
  """Drop decisions exactly, values to 1e-5, gradients to 1e-4."""
  stats = check(router, factor, mesh, exchange)
  if factor is not None and router != "expert_choice":
    assert stats.load.sum() < stats.chosen.sum()  # Something was dropped.


def test_pieces_change_nothing():
  """Slots that travel in three pieces, of unequal size, are the same slots."""
  check("top2", 1.0, "expert 4 x data 2", "all_to_all", exchange_chunks=3)


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


@pytest.mark.parametrize(
  ("dispatcher", "exchange", "factor", "remedy"),
  [
    ("einsum", "all_to_all", 1.0, "auto, or --config.moe.exchange=gspmd"),
    ("einsum", "ragged", None, "auto, or --config.moe.exchange=gspmd"),
    ("grouped", "all_to_all", 1.0, "exchange=ragged or ring"),
    ("grouped", "auto", 1.0, "exchange=ragged or ring"),
    ("gather", "ragged", 1.0, "exchange=all_to_all"),
    ("gather", "ring", 1.0, "exchange=all_to_all"),
    ("gather", "gspmd", 1.0, "exchange=all_to_all"),
    ("grouped", "gspmd", None, "exchange=ragged or ring"),
  ],
)
def test_a_dispatcher_that_an_exchange_would_ignore_is_refused(
  dispatcher, exchange, factor, remedy
):
  """By name, before anything is compiled, and by the layer itself."""
  config = Config(mesh=MESHES["expert 4 x data 2"])
  config.moe.dispatcher, config.moe.exchange = dispatcher, exchange
  config.moe.capacity_factor = factor
  with pytest.raises(ConfigError, match=f"dispatcher={dispatcher} does not.*{remedy}"):
    validate_devices(config, 8)
  with pytest.raises(ConfigError, match=f"dispatcher={dispatcher} does not"):
    shell = make("top2", factor, dispatcher=dispatcher, exchange=exchange)
    compute(shell, factor, MESHES["expert 4 x data 2"], 8)


@pytest.mark.parametrize(
  ("dispatcher", "exchange", "factor"),
  [("gather", "auto", 1.0), ("grouped", "ring", 1.0), ("einsum", "auto", None)],
)
def test_a_dispatcher_that_an_exchange_carries_runs(dispatcher, exchange, factor):
  """And without an expert axis every dispatcher does."""
  config = Config(mesh=MESHES["expert 4 x data 2"])
  config.moe.dispatcher, config.moe.exchange = dispatcher, exchange
  config.moe.capacity_factor = factor
  validate_devices(config, 8)
  for name in ("einsum", "gather", "grouped"):
    config.mesh, config.moe.dispatcher, config.moe.exchange = MeshConfig(), name, "auto"
    validate_devices(config, 8)
  shell = make("top2", factor, dispatcher=dispatcher, exchange=exchange)
  (_, _, stats, _), _ = compute(shell, factor, MESHES["expert 4 x data 2"], 8)
  assert stats.load.sum() > 0


def test_an_exchange_that_cannot_carry_the_routing_is_refused():
  """Slots for dropless; groups that do not divide over the devices."""
  with pytest.raises(ConfigError, match="dropless has none"):
    shell = make("top2", None, exchange="all_to_all")
    compute(shell, None, MESHES["expert 8"], 8)
  with pytest.raises(ConfigError, match="1 routing groups do not divide over 8"):
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
