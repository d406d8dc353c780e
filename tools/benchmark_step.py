"""The whole train step of a config against its dense twin of equal active FLOPs.

  python -m tools.benchmark_step --config=configs/default.py --cores=2 --json=FILE

Random tokens, one document a sequence; the twin is the same config with
moe.dense_twin. Forward, backward, clipping and optimizer are all in the step, and
the state is donated, as in training. Prints the compile time of both, and the ratio
of interleaved steps. --baseline=no_alarms compares with the same config whose alarms are
off instead, each step with what the host does for a logged one.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from typing import Any

from moejax.cli import arguments
from moejax.cli import flags as cli
from moejax.run import timing


def parse(argv: list[str]) -> argparse.Namespace:
  parser = cli.Parser(__doc__)
  parser.add_argument("--config", default="configs/default.py", help="a config file")
  parser.add_argument(
    "--cores", type=arguments.at_least(0), default=2, help="cores to use; 0: all"
  )
  parser.add_argument("--seconds", type=arguments.at_least(0.0), default=20.0)
  parser.add_argument("--baseline", choices=("dense", "no_alarms"), default="dense")
  parser.add_argument(
    "--dispatcher", default="", help="dispatcher to use instead of the config's"
  )
  parser.add_argument("--json", default="", help="write the result to this file")
  return parser.parse_args(argv)


def load_config(path: str) -> Any:
  """What get_config() of this file returns."""
  spec = importlib.util.spec_from_file_location("benchmarked_config", path)
  if spec is None or spec.loader is None:
    raise SystemExit(f"--config={path} is not a Python file.")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


class Stepper:
  """A compiled train step that keeps its own state."""

  def __init__(self, config: Any):
    import jax
    import numpy as np

    from moejax.alarms.watch import Watch
    from moejax.models.make import make_model
    from moejax.sharding.mesh import make_mesh
    from moejax.train.optimizer import make_optimizer
    from moejax.train.state import make_init
    from moejax.train.step import make_train_step

    vocab_size = config.model.vocab_size or config.data.vocab_size
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    model = make_model(config.model, config.moe, vocab_size=vocab_size)
    optimizer = make_optimizer(
      config.optimizer,
      num_steps=config.train.num_steps,
      axes=model.logical_axes(),
      trained=model.trained(),
    )
    self.state = make_init(model, optimizer, mesh)(jax.random.key(0))
    shape = (config.train.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    self.batch = {
      "inputs": tokens,
      "targets": np.roll(tokens, -1, axis=1),
      "segment_ids": np.ones(shape, np.int32),
      "positions": np.ascontiguousarray(positions),
    }
    routers = [s.router for s in model.stacks.values() for _ in s.moe_layers]
    self.watch = Watch(config, routers, model.moe_layers) if routers else None
    self.steps = 0
    before = time.perf_counter()
    step: Any = make_train_step(model, optimizer, config, mesh)
    self.compiled = step.lower(self.state, self.batch).compile()
    self.compile_seconds = time.perf_counter() - before

  def __call__(self) -> None:
    import jax

    self.state, metrics = self.compiled(self.state, self.batch)
    jax.block_until_ready((self.state, metrics))
    self.log(metrics)

  def log(self, metrics: Any) -> None:
    """Does what alarms cost the host in a logged step."""
    import jax

    from moejax.alarms.measures import router_numbers

    if self.watch is None or metrics.health is None:
      return
    self.steps += 1
    found = jax.device_get(metrics)
    numbers = router_numbers(found.sums.stats, found.health, self.watch.routers)
    loss = float(found.sums.loss) / float(found.sums.tokens)
    aux = {name: float(value) for name, value in found.sums.aux.items()}
    self.watch.update(self.steps, found.sums.stats, numbers, aux=aux, loss=loss)


def main(argv: list[str] | None = None) -> None:
  args = parse(sys.argv[1:] if argv is None else argv)
  cores = timing.prepare(args.cores)
  # Later than the pinning, since it imports jax.
  from moejax.alarms.rules import thresholds

  steppers = {}
  for name in ("moe", args.baseline):
    config = load_config(args.config)
    if name == "dense":
      config.moe.dense_twin = True
    if name == "no_alarms":
      for alarm in thresholds(config):
        setattr(config.alarms, alarm, None)
    config.moe.dispatcher = args.dispatcher or config.moe.dispatcher
    steppers[name] = Stepper(config)
  times = timing.interleave(steppers, seconds=args.seconds)
  ratio = timing.compare(times["moe"], times[args.baseline])
  result = {
    "config": args.config,
    "cores": cores,
    "ratio": ratio.median,
    "q1": ratio.q1,
    "q3": ratio.q3,
    "ratio_of_minima": ratio.of_minima,
    "milliseconds": {n: 1e3 * statistics.median(t) for n, t in times.items()},
    "compile_seconds": {n: s.compile_seconds for n, s in steppers.items()},
    "rounds": len(times["moe"]),
  }
  print(json.dumps(result, indent=1))
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(result, file, indent=1)


if __name__ == "__main__":
  main()
