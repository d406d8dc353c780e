"""Generation against Transformers' generate, on the same weights, interleaved.

  python -m tools.benchmark_generate --python=PYTHON [--rows=1,8] [--rounds=5]

PYTHON has torch and transformers (extra hf-test). A model with random weights (12 layers,
D 512, 32 experts of width 256, 4 per token, float32) is exported as Qwen3-MoE and loaded
by both. In each round, one and then the other generates one new token (prefill), then all
of them; the difference is the time of the steps. Both sides are timed around the whole
call, greedy, with a cache, and their tokens/s are compared round by round.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from moejax.cli import arguments
from moejax.cli import flags as cli
from moejax.errors import UserError
from moejax.run import timing

PEER = pathlib.Path(__file__).parent / "transformers_generate.py"


def parse(argv: list[str]) -> argparse.Namespace:
  parser = cli.Parser(__doc__)
  parser.add_argument(
    "--python",
    default=sys.executable,
    help="interpreter that has torch and transformers",
  )
  parser.add_argument("--rows", default="1,8", help="batch sizes")
  parser.add_argument("--prompt", type=arguments.at_least(2), default=128)
  parser.add_argument("--new", type=arguments.at_least(2), default=128)
  parser.add_argument("--vocab_size", type=arguments.at_least(2), default=32_000)
  parser.add_argument("--rounds", type=arguments.at_least(1), default=5)
  parser.add_argument("--cores", type=arguments.at_least(1), default=2)
  parser.add_argument("--json", default="", help="write the result to this file")
  return parser.parse_args(argv)


def make_config(vocab_size: int) -> Any:
  from moejax.config import Config, ModelConfig, MoEConfig

  return Config(
    model=ModelConfig(
      num_layers=12,
      width=512,
      num_heads=8,
      activation="swiglu",
      vocab_size=vocab_size,
      tie_embeddings=False,
      qk_norm=True,
    ),
    moe=MoEConfig(
      num_experts=32,
      num_selected=4,
      hidden=256,
      router="top_k",
      every=1,
      eval_capacity_factor=None,
    ),
  )


class Ours:
  """moejax's side."""

  def __init__(self, folder: str, vocab_size: int):
    import jax
    import jax.numpy as jnp

    from moejax.evaluate import decoding
    from moejax.interop import exporting
    from moejax.models.decoder import Decoder

    config = make_config(vocab_size)
    model = Decoder(config.model, config.moe, vocab_size=vocab_size)
    self.rng = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
      fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 1
      values = self.rng.standard_normal(leaf.shape, np.float32) * fan_in**-0.5
      return jnp.asarray(values, leaf.dtype)

    params = jax.tree.map(draw, model.shapes())
    architecture, _ = exporting.export(config, model, params, folder)
    self.architecture = architecture.name
    self.engine = decoding.Engine(model, params)
    self.how = decoding.Sampling.of(0.0)
    self.allowed = np.ones(vocab_size, bool)

  def __call__(self, rows: int, prompt: int, new: int) -> float:
    shape = (rows, prompt)
    ids = self.rng.integers(1, len(self.allowed), shape).tolist()
    began = time.perf_counter()
    out = self.engine.run(ids, [new] * rows, how=self.how, stop=[], allowed=self.allowed)
    seconds = time.perf_counter() - began
    assert out.num_tokens == rows * new
    return seconds


class Theirs:
  """Transformers' side, in a process of its own."""

  def __init__(self, python: str, folder: str, cores: int):
    command = [python, str(PEER), folder, str(cores)]
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    first = self._read()
    self.version = first.split()[1]

  def __call__(self, rows: int, prompt: int, new: int) -> float:
    assert self.process.stdin is not None
    self.process.stdin.write(f"{rows} {prompt} {new}\n")
    self.process.stdin.flush()
    return float(self._read())

  def close(self) -> None:
    assert self.process.stdin is not None
    self.process.stdin.close()
    self.process.wait()

  def _read(self) -> str:
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    if not line:
      raise UserError("The process of Transformers ended; its last output is above.")
    return line


def check_peer(python: str) -> None:
  """Checks that `python` has what the peer needs.

  Raises:
    UserError: it is not there, or lacks a package.
  """
  try:
    done = subprocess.run(
      [python, "-P", "-c", "import torch, transformers"], capture_output=True, text=True
    )
  except OSError as error:
    raise UserError(f"--python={python}: {error.strerror}.") from error
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["it failed"])[-1]
    raise UserError(
      f"--python={python} cannot import torch and transformers ({last}). Install them "
      "with `pip install 'moejax[hf-test]'` there, or give a Python that has them."
    )


def measure(sides: dict[str, Any], rows: int, args: argparse.Namespace) -> dict[str, Any]:
  """Returns tokens/s of both sides and their ratios, for one batch size."""
  for side in sides.values():  # Compiles, and warms caches.
    side(rows, args.prompt, 1)
    side(rows, args.prompt, args.new)
  speeds: dict[str, dict[str, list[float]]] = {
    name: {"prefill": [], "decode": []} for name in sides
  }
  for _ in range(args.rounds):
    for name, side in sides.items():
      prefill = side(rows, args.prompt, 1)
      steps = max(side(rows, args.prompt, args.new) - prefill, 1e-9)
      speeds[name]["prefill"].append(rows * args.prompt / prefill)
      speeds[name]["decode"].append(rows * (args.new - 1) / steps)
  result: dict[str, Any] = {"rows": rows}
  for phase in ("prefill", "decode"):
    ours, theirs = (speeds[name][phase] for name in ("moejax", "transformers"))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    result[phase] = {
      "moejax": statistics.median(ours),
      "transformers": statistics.median(theirs),
      "ratio": statistics.median(ratios),
      "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
      "ratio_of_best": max(ours) / max(theirs),
    }
  return result


def benchmark(args: argparse.Namespace) -> None:
  check_peer(args.python)
  batches = arguments_of(args.rows)
  cores = timing.prepare(args.cores)
  with tempfile.TemporaryDirectory() as folder:
    target = f"{folder}/model"
    ours = Ours(target, args.vocab_size)
    theirs = Theirs(args.python, target, args.cores)
    print(f"{ours.architecture}, transformers {theirs.version}, {cores} cores")
    sides = {"moejax": ours, "transformers": theirs}
    results = []
    for rows in batches:
      results.append(measure(sides, rows, args))
      tell(results[-1])
    theirs.close()
  if args.json:
    text = json.dumps({"settings": vars(args), "results": results}, indent=1)
    pathlib.Path(args.json).write_text(text + "\n", encoding="utf-8")


def tell(result: dict[str, Any]) -> None:
  for phase in ("prefill", "decode"):
    told = result[phase]
    print(
      f"rows {result['rows']}, {phase}: {told['moejax']:,.1f} vs "
      f"{told['transformers']:,.1f} tokens/s, ratio {told['ratio']:.2f} "
      f"(best of each {told['ratio_of_best']:.2f}; rounds {told['ratios']})",
      flush=True,
    )


def arguments_of(text: str) -> list[int]:
  """Returns the batch sizes.

  Raises:
    UserError: one is not a number above 0.
  """
  words = [word.strip() for word in text.split(",")]
  if not all(word.isdigit() and int(word) > 0 for word in words):
    raise UserError(f"--rows={text} is not a list of batch sizes, such as 1,8.")
  return [int(word) for word in words]


def main(argv: list[str] | None = None) -> None:
  args = parse(sys.argv[1:] if argv is None else argv)
  try:
    benchmark(args)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()
