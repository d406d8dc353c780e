"""The layers that `tools.benchmark_layer` times. Imports jax, so pin cores before."""

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.config.exchange_rule import choose
from moejax.dispatch.registry import DISPATCHERS
from moejax.experts.weights import ExpertWeights, activate
from moejax.routing.base import RouterInputs, SlotPolicy
from moejax.routing.capacity import capacity_of
from moejax.routing.registry import ROUTERS
from moejax.routing.router import Sizes, Tokens
from moejax.run import timing

Show = Callable[[dict[str, Any]], None]


class Settings(NamedTuple):
  device: str
  platform: str
  dtype: str
  activation: str

  @classmethod
  def make(cls, dtype: str, activation: str) -> "Settings":
    device = jax.devices()[0]
    platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    if dtype == "auto":
      dtype = "float32" if platform == "cpu" else "bfloat16"
    return cls(f"{platform} {device.device_kind}", platform, dtype, activation)


def router_of(num_selected: int) -> str:
  return "switch" if num_selected == 1 else "top_k"


def make_dense(shape: Any, settings: Settings) -> tuple[Any, Callable]:
  """Returns the parameters and function of the dense layer of hidden width K*F."""
  keys = jax.random.split(jax.random.key(1), 3)
  hidden, dtype = shape.K * shape.F, settings.dtype
  scale_in, scale_out = shape.D**-0.5, hidden**-0.5
  params = {
    "w_in": scale_in * jax.random.normal(keys[0], (shape.D, hidden), dtype),
    "w_out": scale_out * jax.random.normal(keys[1], (hidden, shape.D), dtype),
  }
  if settings.activation == "swiglu":
    params["w_gate"] = scale_in * jax.random.normal(keys[2], (shape.D, hidden), dtype)

  def dense(params, x):
    pre = x @ params["w_in"]
    gate = x @ params["w_gate"] if "w_gate" in params else None
    return activate(pre, gate, settings.activation) @ params["w_out"], ()

  return params, dense


def make_router(
  shape: Any, settings: Settings, router: str, capacity: int | None, skew: bool
) -> tuple[Any, Callable]:
  """Returns the parameters, and a function from x [T, D] to the `Routing` of a group."""
  chosen = ROUTERS[router]()
  policy = SlotPolicy(
    num_experts=shape.E,
    num_selected=chosen.fixed_selected or shape.K,
    capacity=capacity,
  )
  sizes = Sizes(
    width=shape.D,
    num_experts=shape.E,
    num_selected=policy.num_selected,
    num_tokens=shape.T,
    capacity=capacity,
  )
  draw = functools.partial(jax.random.normal, jax.random.key(2))
  # The usual initialisation, with loads that are nearly but not exactly even.
  params = {"weight": 0.1 * shape.D**-0.5 * draw((shape.D, shape.E))}
  declared = chosen.parameters(sizes)
  for name, own in declared.items():
    params[name] = shape.D**-0.5 * draw(own.shape) if own.fan_in else jnp.zeros(own.shape)
  # Every second token's first choice is expert 0.
  bias = jnp.zeros((shape.T, shape.E)).at[::2, 0].set(20.0 if skew else 0.0)
  table = None
  if chosen.has_table:
    table = jnp.asarray(chosen.table(1024, shape.E, policy.num_selected, None))

  def route(params, x):
    tokens = x.astype(jnp.float32)
    seen = Tokens(clean=tokens[None], seen=tokens[None], project=jnp.matmul)
    features = chosen.features(seen, params, policy)
    inputs = RouterInputs(
      logits=tokens @ params["weight"] + bias,
      valid=jnp.ones(x.shape[:1], bool),
      key=jax.random.key(0),
      assigned=None if table is None else table[jnp.arange(x.shape[0]) % 1024],
      features={name: value[0] for name, value in features.items()},
      params={name: params[name] for name, own in declared.items() if own.by_group},
    )
    return chosen(inputs, policy)

  return params, route


def make_moe(
  shape: Any, settings: Settings, dispatcher: str, factor: float | None, skew: bool
) -> tuple[Any, Callable]:
  """Returns the parameters and function of the MoE layer."""
  capacity = capacity_of(shape.T, shape.E, shape.K, factor)
  router, route = make_router(shape, settings, router_of(shape.K), capacity, skew)
  _, name = choose(
    "auto",
    dispatcher,
    num_selected=shape.K,
    capacity=capacity is not None,
    platform=settings.platform,
  )
  layout = DISPATCHERS[name]
  keys = jax.random.split(jax.random.key(1), 3)
  e, d, f = shape.E, shape.D, shape.F
  weights = ExpertWeights(
    w_in=d**-0.5 * jax.random.normal(keys[0], (e, d, f), settings.dtype),
    w_out=f**-0.5 * jax.random.normal(keys[1], (e, f, d), settings.dtype),
    w_gate=d**-0.5 * jax.random.normal(keys[2], (e, d, f), settings.dtype)
    if settings.activation == "swiglu"
    else None,
  )

  def moe(params, x):
    routing = route(params["router"], x)
    one_group = jax.tree.map(lambda a: a[None], routing.placement)
    run = layout.of(one_group).run
    y = run(x[None], params["experts"], activation=settings.activation)
    return y[0], routing.stats

  return {"router": router, "experts": weights}, moe


class Compiled(NamedTuple):
  run: Callable[[], Any]
  temp_bytes: int


def compile_direction(
  params: Any, function: Callable, shape: Any, settings: Settings, direction: str
) -> Compiled:
  """Compiles the forward pass, alone or with all gradients."""
  keys = jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (shape.T, shape.D), settings.dtype)
  dy = jax.random.normal(keys[1], x.shape, settings.dtype)

  def both(params, x):
    y, pull, stats = jax.vjp(function, params, x, has_aux=True)
    return y, stats, pull(dy)

  compiled = jax.jit(function if direction == "forward" else both).lower(params, x)
  compiled = compiled.compile()
  memory = compiled.memory_analysis()
  return Compiled(
    lambda: jax.block_until_ready(compiled(params, x)),
    memory.temp_size_in_bytes if memory is not None else 0,
  )


def _row(
  shape: Any,
  variant: str,
  direction: str,
  times: list[float],
  baseline: list[float],
  temps: tuple[int, int] | None,
  cores: int,
  against: str,
) -> dict[str, Any]:
  ratio = timing.compare(times, baseline)
  return {
    "shape": shape.name,
    "variant": variant,
    "direction": direction,
    "ratio": ratio.median,
    "q1": ratio.q1,
    "q3": ratio.q3,
    "ratio_of_minima": ratio.of_minima,
    "milliseconds": 1e3 * statistics.median(times),
    "cores": cores,
    "temp_bytes_ratio": temps[0] / max(1, temps[1]) if temps else None,
    "against": against,
  }


def measure(
  shape: Any,
  variants: dict[str, tuple[str, float | None]],
  *,
  skew: bool,
  settings: Settings,
  seconds: float,
  cores: int,
  show: Show,
) -> list[dict[str, Any]]:
  """Returns the rows of a shape: every variant and direction against the dense layer."""
  rows = []
  for direction in ("forward", "both"):
    layers = {"dense": make_dense(shape, settings)}
    for name, (dispatcher, factor) in variants.items():
      layers[name] = make_moe(shape, settings, dispatcher, factor, skew=False)
    if skew:
      layers["skewed"] = make_moe(shape, settings, "auto", None, skew=True)
    compiled = {
      name: compile_direction(*layer, shape, settings, direction)
      for name, layer in layers.items()
    }
    times = timing.interleave({n: c.run for n, c in compiled.items()}, seconds=seconds)
    for name in layers:
      against = "dropless" if name == "skewed" and "dropless" in layers else "dense"
      if name == "dense":
        continue
      temps = compiled[name].temp_bytes, compiled[against].temp_bytes
      row = _row(
        shape, name, direction, times[name], times[against], temps, cores, against
      )
      show(row)
      rows.append(row)
  return rows


def measure_routers(
  shape: Any, settings: Settings, seconds: float, cores: int, show: Show
) -> list[dict[str, Any]]:
  """Returns the rows of the routers alone, forward, against the whole dropless layer."""
  layer = make_moe(shape, settings, "auto", None, skew=False)
  compiled = {"layer": compile_direction(*layer, shape, settings, "forward")}
  for name, chosen in ROUTERS.items():
    # The layer itself is dropless; expert choice and Soft MoE need a number of slots.
    factor = 1.0 if chosen.needs_capacity else None
    capacity = capacity_of(shape.T, shape.E, shape.K, factor)
    router = make_router(shape, settings, name, capacity, skew=False)
    compiled[name] = compile_direction(*router, shape, settings, "forward")
  times = timing.interleave({n: c.run for n, c in compiled.items()}, seconds=seconds)
  rows = []
  for name in compiled:
    if name != "layer":
      row = _row(
        shape,
        f"router {name}",
        "forward",
        times[name],
        times["layer"],
        None,
        cores,
        "the dropless layer",
      )
      show(row)
      rows.append(row)
  return rows
