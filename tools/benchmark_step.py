"""The whole train step of a config against its dense twin of equal active FLOPs.

  python -m tools.benchmark_step --config=configs/default.py --cores=2 --json=FILE

Random tokens, one document a sequence; the twin is the same config with
moe.dense_twin. Forward, backward, clipping and optimizer are all in the step, and
the state is donated, as in training. Prints the compile time of both, and the ratio
of interleaved steps.
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
    "--cores", type=arguments.at_least(0), default=2, help="cores to use; 0 is all"
  )
  parser.add_argument("--seconds", type=arguments.at_least(0.0), default=20.0)
  parser.add_argument("--dispatcher", default="", help="instead of the config's")
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
    before = time.perf_counter()
    step: Any = make_train_step(model, optimizer, config, mesh)
    self.compiled = step.lower(self.state, self.batch).compile()
    self.compile_seconds = time.perf_counter() - before

  def __call__(self) -> None:
    import jax

    self.state, metrics = self.compiled(self.state, self.batch)
    jax.block_until_ready((self.state, metrics))


def main(argv: list[str] | None = None) -> None:
  args = parse(sys.argv[1:] if argv is None else argv)
  cores = timing.prepare(args.cores)
  steppers = {}
  for name in ("moe", "dense"):
    config = load_config(args.config)
    config.moe.dense_twin = name == "dense"
    config.moe.dispatcher = args.dispatcher or config.moe.dispatcher
    steppers[name] = Stepper(config)
  times = timing.interleave(steppers, seconds=args.seconds)
  ratio = timing.compare(times["moe"], times["dense"])
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
