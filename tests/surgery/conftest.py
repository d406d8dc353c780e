"""Runs in directories, made without training: parameters and moments are drawn."""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import files
from moejax.checkpoint.manager import Checkpointer
from moejax.config import Config, DataConfig, MeshConfig, TrainConfig
from moejax.config import text as config_text
from moejax.data.tokenizer import ByteTokenizer
from moejax.models.make import make_model
from moejax.run.files import CONFIG_FILE, DIRECTORY
from moejax.sharding.mesh import make_mesh
from moejax.train import state as state_lib
from moejax.train.optimizer import make_optimizer
from tests.surgery.common import config

CORPUS = pathlib.Path(__file__).parents[1] / "data" / "corpus"


def run_config(**changes: Any) -> Config:
  """Four layers, every second one MoE, scanned."""
  made = config(
    **{
      "model__num_layers": 4,
      "every": 2,
      "offset": 1,
      "model__activation": "swiglu",
      "renormalize": "before_drop",
    }
    | changes
  )
  made.data = DataConfig(name="text", path=str(CORPUS), sequence_length=16, prefetch=1)
  made.train = TrainConfig(batch_size=4, num_steps=20, eval_batches=1)
  return made


def mesh(**sizes: int) -> Any:
  """A mesh of as many of the fake devices as the sizes say; one by default."""
  sizes = {"data": 1, **sizes}
  config = MeshConfig()
  for axis, size in sizes.items():
    setattr(config, axis, size)
  return make_mesh(config, jax.devices()[: math.prod(sizes.values())])


def make_run(
  directory: pathlib.Path,
  config: Config,
  on: Any = None,
  step: int = 7,
  seed: int = 0,
) -> pathlib.Path:
  """Writes a run with one checkpoint, of a random state, sharded over a mesh."""
  model = make_model(config.model, config.moe, vocab_size=ByteTokenizer.vocab_size)
  optimizer = make_optimizer(
    config.optimizer,
    num_steps=20,
    axes=model.logical_axes(),
    trained=model.trained(),
  )
  target = state_lib.state_shapes(model, optimizer, on or mesh())
  rng = np.random.default_rng(seed)

  def draw(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.device_put(jax.random.key(5), leaf.sharding)
    if leaf.dtype == jnp.int32:
      return jax.device_put(np.asarray(step, np.int32), leaf.sharding)
    # Second moments are not negative.
    values = np.abs(rng.normal(size=leaf.shape) * 0.3).astype(leaf.dtype)
    return jax.device_put(values, leaf.sharding)

  state = jax.tree.map(draw, target)
  checkpointer = Checkpointer(
    directory / DIRECTORY,
    keep_last=1,
    keep_best=0,
    config=config,
    metadata={"dataset_fingerprint": "d", "corpus_fingerprint": "c"},
    logical_axes=model.logical_axes(),
  )
  checkpointer.save(step, state, position={"step": step, "seed": 0})
  assert checkpointer.close()
  ByteTokenizer().save(directory)
  files.write_json(directory / CONFIG_FILE, config_text.to_dict(config))
  return directory


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> pathlib.Path:
  """A run with two MoE layers of four experts."""
  return make_run(tmp_path_factory.mktemp("source") / "run", run_config())
