"""Checks routers, expert parallelism and training on devices against the CPU.

Letters: B batch, S sequence, D width, E experts, K choices per token.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.config import (
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainConfig,
)
from moejax.device_check.compare import (
  DTYPES,
  TOLERANCE,
  agree,
  compute,
  cpu,
  device,
  exact_products,
  mesh_of,
  rounded,
)
from moejax.device_check.runner import Check, Mismatch, Outcome
from moejax.layers.moe import MoE
from moejax.layers.router import RouterLayer
from moejax.models.decoder import Decoder
from moejax.models.loss import to_devices
from moejax.models.shell import Shell
from moejax.routing.placement import Mixture, Placement
from moejax.routing.registry import ROUTERS
from moejax.sharding import rules
from moejax.sharding.mesh import make_mesh
from moejax.train import state as state_lib
from moejax.train import step as step_lib
from moejax.train.optimizer import make_optimizer

# Routers.

GROUPS, TOKENS, WIDTH, EXPERTS = 2, 64, 32, 16
VOCAB = 64


def router_inputs() -> tuple[Any, Any, Any]:
  """Returns tokens [G, T, D], which of them are real, and their ids."""
  rng = np.random.default_rng(3)
  tokens = rng.normal(size=(GROUPS, TOKENS, WIDTH)).astype(np.float32)
  valid = np.ones((GROUPS, TOKENS), bool)
  valid[:, -5:] = False
  ids = rng.integers(0, VOCAB, (GROUPS, TOKENS), dtype=np.int32)
  return jnp.asarray(tokens), jnp.asarray(valid), jnp.asarray(ids)


def routed(name: str, training: bool) -> Any:
  """Returns the params of a router layer, and a function that runs it.

  The function returns the layer's decisions, values and gradients.
  """
  router = ROUTERS[name]
  options = {"second_policy": "random"} if name == "top2" else {}
  moe = MoEConfig(
    num_experts=EXPERTS,
    num_selected=router.fixed_selected or 2,
    router=name,
    options={name: options},
    router_init_scale=3.0,
    capacity_factor=1.0,
    group_size=TOKENS,
  )
  shell = Shell(lambda key: RouterLayer(WIDTH, moe, nnx.Rngs(params=key)))
  _, valid, ids = router_inputs()
  assigned = None
  if router.has_table:
    assigned = jnp.asarray(router().table(VOCAB, EXPERTS, 2, None))[ids]

  def run(params: Any, tokens: Any) -> Any:
    def total(params: Any, tokens: Any) -> Any:
      _, routing = shell.merge(params)(
        *(tokens, valid, ids, assigned),
        key=jax.random.key(1) if training else None,
        capacity_factor=1.0,
      )
      placement = routing.placement
      mixed = isinstance(placement, Mixture)
      weights = [placement.combine if mixed else placement.gate, routing.probs]
      sums = [jnp.sum(w * _waves(w.shape)) for w in weights]
      sums += [jnp.sum(term) for term in (routing.losses or {}).values()]
      return functools.reduce(jnp.add, sums), routing

    grads, routing = jax.grad(total, argnums=(0, 1), has_aux=True)(params, tokens)
    return {
      "placement": _placed(routing.placement),
      "probs": routing.probs,
      "losses": routing.losses,
      "stats": routing.stats,
      "gradients": rounded(grads, "float32"),
    }

  return run, shell.init(jax.random.key(0))


def _placed(placement: Placement) -> Any:
  """Returns a placement's content, with 0 for the meaningless entries of dropped
  assignments."""
  if isinstance(placement, Mixture):
    return placement
  return {
    "kept": placement.kept,
    "expert": jnp.where(placement.kept, placement.expert, 0),
    "slot": jnp.where(placement.kept, placement.slot, 0),
    "load": placement.load,
    "gate": placement.gate,
  }


def _waves(shape: tuple[int, ...]) -> jax.Array:
  """Returns a cotangent in which no two entries are equal."""
  n = int(np.prod(shape))
  return jnp.asarray(np.cos(np.arange(n)).reshape(shape), jnp.float32)


def check_router(name: str, training: bool, dtype: str) -> Outcome:
  """Checks that decisions are equal, and compares values and gradients.

  Routers always compute in float32. `dtype` is that of the tokens, which are the same on
  both sides, and of their gradients.
  """
  run, params = routed(name, training)
  tokens = router_inputs()[0].astype(dtype)
  with exact_products("float32"):
    got = compute(device(), run, params, tokens)
    want = compute(cpu(), run, params, tokens)
  return agree(got, want, dtype)


def router_checks() -> Iterator[Check]:
  for name in ROUTERS:
    for training in (False, True) if ROUTERS[name].needs_key else (False,):
      for dtype in DTYPES:
        run = functools.partial(check_router, name, training, dtype)
        label = f"{name}{', training' if training else ''}, {dtype} tokens"
        basic = dtype == "float32" and not training
        yield Check("routers", label, run, basic=basic)


# Experts over several devices.

EXCHANGES = {"all_to_all": 1.0, "ragged": None, "ring": None, "gspmd": 1.0}
"""Exchanges, with the capacity factor of the layer in which each is checked."""


def meshes(num_devices: int) -> dict[str, MeshConfig]:
  """Returns meshes with experts over the largest power of two of devices; with four or
  more, also one that shards weights."""
  most = 1 << (num_devices.bit_length() - 1)
  found = {f"expert {most}": MeshConfig(data=1, expert=most)}
  if most >= 4:
    config = MeshConfig(data=1, expert=most // 2, fsdp=2)
    found[f"expert {most // 2} x fsdp 2"] = config
  return found


def check_exchange(exchange: str, config: MeshConfig, dtype: str) -> Outcome:
  """Checks a whole MoE layer over the devices against one CPU device, with gradients."""
  most = config.expert * config.fsdp
  factor = EXCHANGES[exchange]
  model = ModelConfig(num_layers=2, width=128, num_heads=2, activation="swiglu")
  moe = MoEConfig(
    num_experts=2 * most,
    num_selected=2,
    hidden=128,
    router="top_k",
    capacity_factor=factor,
    router_init_scale=3.0,
    exchange=exchange,
  )
  shell = Shell(lambda key: MoE(model, moe, nnx.Rngs(params=key)))
  rng = np.random.default_rng(0)
  x, dy = (jnp.asarray(rng.normal(size=(most, 32, 128)), jnp.float32) for _ in range(2))

  def layer(params: Any, x: Any, dy: Any) -> Any:
    def total(params: Any, x: Any) -> Any:
      valid, ids = jnp.ones(x.shape[:2], bool), jnp.zeros(x.shape[:2], jnp.int32)
      y, aux = shell.merge(params)(
        x, valid, ids, key=jax.random.key(3), train=True, capacity_factor=factor
      )
      value = jnp.sum(y.astype(jnp.float32) * dy) + sum(aux.losses.values())
      return value, (y, aux.losses, aux.stats.load)

    grads, out = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
    return out, grads

  params, x = shell.init(jax.random.key(0)), x.astype(dtype)
  mesh = make_mesh(config, jax.devices()[:most])
  with jax.set_mesh(mesh), exact_products(dtype):
    placed = rules.shardings(mesh, shell.axes, jax.eval_shape(lambda: params))
    tokens = rules.batch_sharding(mesh)
    step = jax.jit(layer, in_shardings=(placed, tokens, tokens))
    args = (jax.device_put(params, placed), *jax.device_put((x, dy), tokens))
    got = jax.device_get(step(*args))
  with exact_products("float32"):
    want = compute(cpu(), layer, params, x.astype(jnp.float32), dy)
  return agree(got, want, dtype)


def exchange_checks() -> Iterator[Check]:
  count = jax.device_count()
  reason = "" if count > 1 else "one device: nothing to exchange"
  for name, config in meshes(count).items():
    for exchange in EXCHANGES:
      for dtype in DTYPES if config.fsdp == 1 else DTYPES[:1]:
        run = functools.partial(check_exchange, exchange, config, dtype)
        basic = exchange == "ragged" and config.fsdp == 1 and dtype == "float32"
        label = f"{exchange}, {name}, {dtype}"
        yield Check("exchanges", label, run, reason, basic)


# Training.

STEPS = 50
LAST_LOSS = 0.6
"""The last loss must be at most this fraction of the first: something was learned."""
CURVE = {"float32": 0.01, "bfloat16": 0.02}
"""Largest relative difference of a loss from the CPU's. Rounding errors grow from step to
step, and a different routing decision causes jumps: on a CPU, parameters that differ by
1e-6 to 1e-5 at the start give losses up to 0.3% apart, and so does bfloat16."""


def training_config(dtype: str) -> Config:
  """Returns the config of two layers, the second sparse and dropless."""
  return Config(
    data=DataConfig(tokenizer="bytes", sequence_length=64),
    model=ModelConfig(num_layers=2, width=32, num_heads=2, hidden=64, dtype=dtype),
    moe=MoEConfig(num_experts=4, num_selected=2, router="top_k", hidden=64, every=2),
    optimizer=OptimizerConfig(
      learning_rate=4e-3, warmup_steps=4, schedule="inverse_sqrt"
    ),
    train=TrainConfig(num_steps=STEPS, batch_size=8),
    mesh=MeshConfig(data=1),
  )


def batches(config: Config) -> Iterator[dict[str, np.ndarray]]:
  """Yields random sentences of twenty words: learnable, and the same everywhere."""
  rng = np.random.default_rng(0)
  length, size = config.data.sequence_length, config.train.batch_size
  words = [bytes(rng.integers(97, 123, n)) + b" " for n in rng.integers(2, 9, 20)]
  for _ in range(config.train.num_steps):
    rows = [
      b"".join(words[i] for i in rng.integers(0, 20, length))[: length + 1]
      for _ in range(size)
    ]
    text = np.stack([np.frombuffer(row, np.uint8) for row in rows]).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (size, length))
    yield {
      "inputs": text[:, :-1],
      "targets": text[:, 1:],
      "segment_ids": np.ones((size, length), np.int32),
      "positions": np.ascontiguousarray(positions),
    }


@functools.cache
def losses_on(where: Any, dtype: str, nudge: float = 0.0) -> np.ndarray:
  """Returns the loss of each step, trained on one device from parameters made on the CPU.

  Args:
    where: the device.
    dtype: dtype of the computation.
    nudge: makes each parameter larger by this fraction.
  """
  config = training_config(dtype)
  model = Decoder(config.model, config.moe, vocab_size=256)
  optimizer = make_optimizer(
    config.optimizer,
    num_steps=config.train.num_steps,
    axes=model.logical_axes(),
    trained=model.trained(),
  )
  first = state_lib.make_init(model, optimizer, mesh_of(cpu()))(jax.random.key(0))
  params = jax.tree.map(lambda p: p * jnp.asarray(1 + nudge, p.dtype), first["params"])
  mesh = mesh_of(where)
  with jax.set_mesh(mesh), exact_products(dtype):
    state = jax.device_put({**first, "params": params}, rules.replicated(mesh))
    step = step_lib.make_train_step(model, optimizer, config, mesh)
    losses = []
    for batch in batches(config):
      state, metrics = step(state, to_devices(batch, mesh))
      losses.append(metrics.sums.loss / metrics.sums.tokens)
    return np.asarray(jax.device_get(losses), np.float64)


def check_training(dtype: str) -> Outcome:
  """Checks fifty steps: each loss is near the CPU's, and the last one shows learning."""
  got, want = losses_on(device(), dtype), losses_on(cpu(), "float32")
  if not np.all(np.isfinite(got)):
    raise Mismatch(f"loss is not finite from step {1 + int(np.argmin(np.isfinite(got)))}")
  error, tolerance = np.abs(got - want) / want, CURVE[dtype]
  worst = int(np.argmax(error))
  detail = (
    f"loss {got[0]:.3f} to {got[-1]:.3f}, at most {error[worst]:.1e} from the CPU's "
    f"(step {worst + 1}; at most {tolerance:.0e})"
  )
  numbers = {"error": float(error[worst]), "tolerance": tolerance}
  numbers |= {"first_loss": float(got[0]), "last_loss": float(got[-1])}
  # At the first step, rounding errors have not grown yet.
  if error[worst] > tolerance or error[0] > TOLERANCE[dtype]:
    raise Mismatch(detail, **numbers)
  if got[-1] > LAST_LOSS * got[0]:
    raise Mismatch(f"{detail}; nothing learned", **numbers)
  return Outcome(detail, numbers)


def training_checks() -> Iterator[Check]:
  for dtype in DTYPES:
    run = functools.partial(check_training, dtype)
    yield Check("training", f"{STEPS} steps, {dtype}", run, basic=dtype == "float32")
