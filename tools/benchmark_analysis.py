"""What an analysis costs, as ratios to a plain evaluation of the same text.

  python -m tools.benchmark_analysis --workdir=runs/default [--rounds=20]

  collection   one batch of `collect` over one of `evaluate`
  explorer     the same with the sample of tokens for the page
  replay       one batch of `evaluate` over one setting's decisions, for each setting
  knock-out    all experts of a layer, in evaluations per expert, for each MoE layer

Calls alternate, so that other work on the machine affects all of them; medians of
rounds are printed. Compilation is not counted.
"""

import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax import data
from moejax.analysis import collect, knockout, replay
from moejax.analysis.explorer.sample import Sampler
from moejax.analysis.layerwise import Layerwise
from moejax.checkpoint.manager import restore_params
from moejax.cli import flags as cli
from moejax.cli import restored
from moejax.config import MeshConfig
from moejax.evaluate import groups, perplexity
from moejax.sharding import rules
from moejax.sharding.mesh import make_mesh

SETTINGS = (
  {"capacity_factor": 0.5},
  {"capacity_factor": 1.25},
  {"capacity_factor": 1.25, "priority": "gate"},
  {"capacity_factor": 1.0, "overflow": "next_best"},
)


def main() -> None:
  parser = cli.Parser(__doc__)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--rounds", type=int, default=20)
  args = parser.parse_args()
  params, config, _ = restore_params(args.workdir)
  dataset = data.load(config.data, workdir=args.workdir, store=False)
  model = groups.make_model(config, dataset.tokenizer.vocab_size)
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  batch_size = groups.batch_size(config, mesh, (config.moe.capacity_factor,))
  batches = perplexity.device_batches(
    dataset, "validation", mesh=mesh, batch_size=batch_size, limit=1
  )
  batch = next(iter(batches))
  with jax.set_mesh(mesh):
    calls = _calls(model, params, dataset, config, mesh, batch)
    seconds = _interleaved(calls, args.rounds)
  plain = seconds["evaluation"]
  print(f"evaluation  {1e3 * plain:.1f} ms for {batch['inputs'].size} tokens")
  for name in ("collection", "explorer"):
    print(f"{name:<11} {seconds[name] / plain:.2f} evaluations")
  for setting in SETTINGS:
    name = replay.show(setting)
    print(f"replay      {plain / seconds[name]:.0f} times as fast, {name}")
  shares = []
  for layer in model.moe_layers:
    shares.append(seconds[f"layer {layer}"] / plain / model.moe.fine_experts)
    print(f"knock-out   {shares[-1]:.2f} evaluations per expert, layer {layer}")
  print(f"knock-out   {statistics.mean(shares):.2f} on average over MoE layers")


def _calls(
  model: Any, params: Any, dataset: Any, config: Any, mesh: Any, batch: Any
) -> dict[str, Callable[[], Any]]:
  """Returns what is timed, by name; each call ends when its result is there."""
  evaluate = perplexity.make_step(model, mesh, groups.least_factor(model))
  words = collect.vocabulary(dataset.token_counts("validation"))
  step = collect.make_step(model, mesh, len(dataset.domains), words)
  held = {
    name: jax.device_put(jnp.zeros(shape, jnp.int32), rules.replicated(mesh))
    for name, shape in collect.table_shapes(model, words).items()
  }
  params = jax.device_put(params, rules.replicated(mesh))

  telling = collect.make_step(model, mesh, len(dataset.domains), words, with_routes=True)
  sampler = Sampler(
    mesh,
    tokens=restored.EXPLORE_TOKENS,
    length=batch["inputs"].shape[1],
    total=dataset.num_tokens("validation"),
  )

  def collected() -> Any:
    tables, sums, _ = step(params, dict(held), batch)
    held.update(tables)
    return jax.block_until_ready((tables, sums))

  def sampled() -> Any:
    tables, sums, seen = telling(params, dict(held), batch)
    held.update(tables)
    assert seen is not None
    sampler.see(*seen, batch)
    return jax.block_until_ready((tables, sums))

  routes = jax.jit(
    lambda p, b: (
      model(
        p,
        b["inputs"],
        segment_ids=b["segment_ids"],
        positions=b["positions"],
        capacity_factor=groups.least_factor(model),
        return_routes=True,
      ).routes
    )
  )(params, batch)
  recorded, own = replay.make_recorder(model, mesh)(params, routes, batch)
  calls = {
    "evaluation": lambda: jax.block_until_ready(evaluate(params, batch)),
    "collection": collected,
    "explorer": sampled,
  }
  for setting in SETTINGS:
    decider = replay.make_decider(replay.configured(config, setting).moe, mesh)
    calls[replay.show(setting)] = lambda d=decider: jax.block_until_ready(
      d(recorded, own)
    )
  run = Layerwise(model, params, mesh, groups.least_factor(model))
  for layer in model.moe_layers:
    sets = knockout.singles(model, [layer])
    calls[f"layer {layer}"] = lambda s=sets: jax.block_until_ready(
      knockout.batch_losses(run, batch, s, "next_best")
    )
  return calls


def _interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
  """Returns the median seconds of each call, all of them in every round."""
  taken: dict[str, list[float]] = {name: [] for name in calls}
  for call in calls.values():
    call()
  for _ in range(rounds):
    for name, call in calls.items():
      began = time.perf_counter()
      call()
      taken[name].append(time.perf_counter() - began)
  return {name: statistics.median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
  main()
