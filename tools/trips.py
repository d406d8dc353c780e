"""The files of moejax that a value passes through, in the order in which it meets them.

  python -m tools.trips token    one token through an MoE layer under all_to_all
  python -m tools.trips batch    one batch from text to a checkpoint

Runs a tiny case and records every function of moejax that is called. Left out are
files that only describe: configs, types, errors, registries, names of parts.
docs/architecture.md shows both lists, and a test keeps them true.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moejax.cli import flags as cli

ROOT = pathlib.Path(__file__).resolve().parent.parent / "moejax"
LEFT_OUT = ("config/", "types.py", "errors.py", "registry.py", "options.py", "parts.py")

Files = Mapping[str, list[str]]
"""Functions by file, both in the order of their first call."""


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, list[str]]]:
  """Records the functions of moejax that run in the block, in all threads."""
  files: dict[str, list[str]] = collections.defaultdict(list)

  def note(frame: Any, event: str, argument: Any) -> None:
    del argument
    if event != "call" or not frame.f_code.co_filename.startswith(f"{ROOT}/"):
      return
    file = frame.f_code.co_filename.removeprefix(f"{ROOT}/")
    name = frame.f_code.co_name
    described = file.startswith(LEFT_OUT[:1]) or file.endswith(LEFT_OUT[1:])
    # Lambdas and comprehensions are part of the function that they stand in.
    if not described and not name.startswith("<") and name not in files[file]:
      files[file].append(name)

  threading.setprofile(note)
  sys.setprofile(note)
  try:
    yield files
  finally:
    sys.setprofile(None)
    threading.setprofile(None)
    for file in [file for file, names in files.items() if not names]:
      del files[file]


def token() -> Files:
  """Traces top-2 of four experts on two devices, in training."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from moejax.config import MeshConfig, ModelConfig, MoEConfig
  from moejax.layers.moe import MoE
  from moejax.models.shell import Shell
  from moejax.sharding.mesh import make_mesh

  model = ModelConfig(num_layers=1, width=8, num_heads=2)
  moe = MoEConfig(num_experts=4, num_selected=2, hidden=8, router="top_k")
  shell = Shell(lambda key: MoE(model, moe, nnx.Rngs(params=key)))
  found: Files = {}

  def layer(params: Any, x: jax.Array, valid: jax.Array, ids: jax.Array) -> jax.Array:
    nonlocal found
    module = shell.merge(params)
    with recorded() as files:
      y, _ = module(
        *(x, valid, ids), key=jax.random.key(0), train=True, capacity_factor=1.25
      )
    found = files
    return y

  mesh = make_mesh(MeshConfig(data=1, expert=2), jax.devices()[:2])
  arrays = (jnp.zeros((2, 8, 8)), jnp.ones((2, 8), bool), jnp.zeros((2, 8), jnp.int32))
  with jax.set_mesh(mesh):
    jax.eval_shape(layer, shell.init(jax.random.key(0)), *arrays)
  return found


def batch() -> Files:
  """One step of a tiny model on files of its own, and the checkpoint after it."""
  import jax

  from moejax.config import Config
  from moejax.config.check import validate
  from moejax.run.progress import Silent
  from moejax.run.signals import StopRequest
  from moejax.train import loop, setup

  config = Config()
  config.model.num_layers, config.model.width, config.model.num_heads = 2, 16, 2
  config.moe.num_experts = 4
  config.data.name, config.data.tokenizer = "text", "bytes"
  config.data.sequence_length, config.train.batch_size = 32, 4
  config.train.num_steps, config.train.eval_every = 1, 0
  config.train.tensorboard = False
  with tempfile.TemporaryDirectory() as name:
    directory = pathlib.Path(name)
    for index in range(20):
      text = " ".join(f"{word} of {index}" for word in ("one", "two", "three") * 40)
      file = directory / "text" / f"{index}.txt"
      file.parent.mkdir(exist_ok=True)
      file.write_text(text, encoding="utf-8")
    config.data.path, config.data.cache_dir = f"{directory}/text", f"{directory}/cache"
    validate(config)
    with recorded() as files:
      run = setup.set_up(config, directory / "run", devices=jax.devices()[:1])
      with StopRequest("now") as stop, jax.set_mesh(run.mesh):
        loop.fit(run, Silent(), stop)
      run.checkpointer.wait()
    run.checkpointer.close()
  return files


TRIPS: Mapping[str, Callable[[], Files]] = {"token": token, "batch": batch}


def main(argv: list[str] | None = None) -> None:
  parser = cli.Parser(__doc__)
  parser.add_argument("trip", choices=[*TRIPS])
  parser.add_argument("--functions", action=argparse.BooleanOptionalAction, default=True)
  args = parser.parse_args(argv)
  # Read when jax is imported.
  os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
  files = TRIPS[args.trip]()
  for file, names in files.items():
    print(f"{file:32}{', '.join(names) if args.functions else ''}".rstrip())
  print(f"# {len(files)} files")


if __name__ == "__main__":
  main()
