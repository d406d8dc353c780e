"""Experts over two devices against the same work on one: forward and backward.

  python -m tools.benchmark_exchange --shapes=A,B,C,D --json=FILE

Two fake devices of this machine's CPU share its cores with the single device they are
compared with, so what is measured is what the exchange costs: moving rows, waiting for
each other, and products over half of the experts at a time. T tokens in two routing
groups, router included; medians of interleaved runs in one process.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from moejax.cli import arguments
from moejax.cli import flags as cli
from moejax.run import timing
from tools.benchmark_layer import FACTOR, SHAPES

DEVICES = 2
VARIANTS: dict[str, tuple[str, float | None]] = {
  "all_to_all": ("all_to_all", FACTOR),
  "ragged": ("ragged", None),
  "ring": ("ring", None),
}
"""Exchange and capacity factor; compared with one device at the same factor."""


def parse(argv: list[str]) -> argparse.Namespace:
  parser = cli.Parser(__doc__)
  parser.add_argument("--shapes", default="A,B,C,D", help="shapes to measure, of A,B,C,D")
  parser.add_argument("--variants", default=",".join(VARIANTS))
  parser.add_argument(
    "--seconds", type=arguments.at_least(0.0), default=15.0, help="seconds per shape"
  )
  parser.add_argument("--json", default="", help="write the rows to this file")
  args = parser.parse_args(argv)
  arguments.split_names(parser, args, shapes=SHAPES, variants=VARIANTS)
  return args


def make_layer(shape: Any, capacity_factor: float | None, exchange: str) -> Callable:
  """(params, x [G, T, D]) -> a number; its experts wherever the mesh in scope says."""
  import jax
  import jax.numpy as jnp

  from moejax.device_check.layer_variants import router_of
  from moejax.exchange.base import Options
  from moejax.exchange.run import run
  from moejax.routing.base import RouterInputs, SlotPolicy
  from moejax.routing.capacity import capacity_of
  from moejax.routing.registry import ROUTERS
  from moejax.sharding.mesh import over_groups

  capacity = capacity_of(shape.T // DEVICES, shape.E, shape.K, capacity_factor)
  policy = SlotPolicy(num_experts=shape.E, num_selected=shape.K, capacity=capacity)
  route = ROUTERS[router_of(shape.K)]()

  def groups(inputs: Any, shared: None) -> Any:
    del shared
    logits, valid = inputs
    return jax.vmap(lambda a, b: route(RouterInputs(logits=a, valid=b), policy))(
      logits, valid
    )

  def layer(params: Any, x: Any) -> Any:
    logits = jnp.einsum("gtd,de->gte", x, params["router"])
    valid = jnp.ones(logits.shape[:2], bool)
    routing = over_groups(groups, (logits, valid), None, DEVICES)
    options = Options(activation="gelu", num_selected=shape.K, exchange=exchange)
    y, _ = run(x, routing.placement, params["experts"], options)
    return jnp.sum(y * x)

  return layer


def compile_on(shape: Any, variant: tuple[str, float | None], devices: int) -> Callable:
  """Forward and backward on so many devices, ready to be timed."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  from moejax.config import MeshConfig
  from moejax.experts.weights import ExpertWeights
  from moejax.sharding import rules
  from moejax.sharding.mesh import make_mesh

  exchange, factor = variant
  mesh = make_mesh(MeshConfig(data=1, expert=devices), jax.devices()[:devices])
  keys = jax.random.split(jax.random.key(0), 4)
  by_expert = NamedSharding(mesh, PartitionSpec("expert"))

  def normal(key: Any, *size: int) -> Any:
    return size[-2] ** -0.5 * jax.random.normal(key, size, jnp.float32)

  params = {
    "router": 0.1 * normal(keys[0], shape.D, shape.E),
    "experts": ExpertWeights(
      w_in=normal(keys[1], shape.E, shape.D, shape.F),
      w_out=normal(keys[2], shape.E, shape.F, shape.D),
    ),
  }
  places = {"router": rules.replicated(mesh), "experts": by_expert}
  x = jax.random.normal(keys[3], (DEVICES, shape.T // DEVICES, shape.D))
  layer = make_layer(shape, factor, exchange if devices > 1 else "auto")
  with jax.set_mesh(mesh):
    params = {name: jax.device_put(params[name], places[name]) for name in params}
    x = jax.device_put(x, rules.batch_sharding(mesh))
    step = jax.jit(jax.value_and_grad(layer, argnums=(0, 1))).lower(params, x).compile()
  return lambda: jax.block_until_ready(step(params, x))


def main(argv: list[str] | None = None) -> None:
  args = parse(sys.argv[1:] if argv is None else argv)
  # Read when jax is imported, which giving it memory settings does.
  os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
  cores = timing.prepare(0)
  print(f"# {DEVICES} fake devices on {cores} core(s), forward and backward")
  print(f"{'shape':8}{'exchange':14}{'ratio':>7}{'q1':>7}{'q3':>7}{'minima':>8}{'ms':>9}")
  rows = []
  for name in args.shapes:
    shape, functions = SHAPES[name], {}
    for variant in args.variants:
      functions[variant] = compile_on(shape, VARIANTS[variant], DEVICES)
      factor = VARIANTS[variant][1]
      functions.setdefault(f"one {factor}", compile_on(shape, (variant, factor), 1))
    times = timing.interleave(functions, seconds=args.seconds)
    for variant in args.variants:
      baseline = times[f"one {VARIANTS[variant][1]}"]
      ratio = timing.compare(times[variant], baseline)
      median = sorted(times[variant])[len(times[variant]) // 2]
      row = {"shape": name, "exchange": variant, "ms": 1e3 * median} | ratio._asdict()
      rows.append(dataclasses.asdict(shape) | row)
      print(
        f"{name:8}{variant:14}{ratio.median:7.2f}{ratio.q1:7.2f}{ratio.q3:7.2f}"
        f"{ratio.of_minima:8.2f}{1e3 * median:9.1f}",
        flush=True,
      )
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(rows, file, indent=1)


if __name__ == "__main__":
  main()
