"""One tiny model, its compiled steps and one corpus, shared by the tests here."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from moejax.config import (
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainConfig,
)
from moejax.data.tokenizer import ByteTokenizer
from moejax.models.decoder import Decoder
from moejax.models.loss import to_devices
from moejax.sharding.mesh import make_mesh
from moejax.train import finish, loop
from moejax.train import state as state_lib
from moejax.train import step as step_lib
from moejax.train.optimizer import Optimizer, make_optimizer

CORPUS = pathlib.Path(__file__).parents[1] / "data" / "corpus"
VOCAB = 264
TOKEN_BYTES = ByteTokenizer().bytes_per_token.astype(np.float32)


def tiny_config(**train) -> Config:
  """Two layers, the second sparse, 32 wide; one device unless changed."""
  settings = {
    "num_steps": 20,
    "batch_size": 8,
    "log_every": 1,
    "eval_every": 0,
    "checkpoint_every": 0,
    "tensorboard": False,
    "max_bad_steps": 3,
    "trace_steps": 0,
  }
  return Config(
    data=DataConfig(name="text", path=str(CORPUS), sequence_length=32, prefetch=1),
    # Untied, so that a poisoned embedding row is seen only where it is looked up.
    model=ModelConfig(
      num_layers=2, width=32, num_heads=2, hidden=64, tie_embeddings=False
    ),
    # The dispatcher that compiles fastest; all are equal (tests/dispatch).
    moe=MoEConfig(num_experts=4, hidden=64, every=2, dispatcher="gather"),
    # The one schedule that does not know num_steps: runs of any length share a
    # compiled step.
    optimizer=OptimizerConfig(
      learning_rate=1e-2, warmup_steps=4, schedule="inverse_sqrt"
    ),
    train=TrainConfig(**(settings | train)),
    mesh=MeshConfig(data=1),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """A model with its compiled steps on one mesh."""

  config: Config
  mesh: jax.sharding.Mesh
  model: Decoder
  optimizer: Optimizer
  init: Callable[..., Any]
  step: Callable[..., Any]
  evaluate: Callable[..., Any]

  def state(self, seed: int = 0):
    """A fresh state: the step consumes it."""
    return self.init(jax.random.key(seed))

  def place(self, batch):
    return to_devices(batch, self.mesh)

  def run(self, state, *batches):
    """Steps over the batches; the last state and each step's metrics, on the host."""
    seen = []
    with jax.set_mesh(self.mesh):
      for batch in batches:
        state, metrics = self.step(state, self.place(batch))
        seen.append(jax.device_get(metrics))
    return state, seen


def make_setup(config: Config, num_devices: int = 1) -> Setup:
  mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
  model = Decoder(config.model, config.moe, vocab_size=VOCAB, frozen=config.train.frozen)
  optimizer = make_optimizer(
    config.optimizer,
    num_steps=config.train.num_steps,
    axes=model.logical_axes(),
    trained=model.trained(),
  )
  return Setup(
    config=config,
    mesh=mesh,
    model=model,
    optimizer=optimizer,
    init=state_lib.make_init(model, optimizer, mesh),
    step=step_lib.make_train_step(
      model, optimizer, config, mesh, token_bytes=TOKEN_BYTES
    ),
    evaluate=step_lib.make_eval_step(model, mesh, None),
  )


@pytest.fixture(scope="session")
def setup(compilation_cache) -> Setup:
  return make_setup(tiny_config())


@pytest.fixture(scope="session")
def gradients(setup):
  """(params, batch) -> sums and gradients of the batch in one piece, compiled once."""
  key = jax.random.key(7)
  return jax.jit(lambda p, b: step_lib.loss_gradients(setup.model, p, b, key))


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
  """What one run compiled the next one loads: resuming is tested, not XLA.

  Returns:
    The directory, for processes that a test starts.
  """
  directory = tmp_path_factory.mktemp("xla")
  names = {
    "jax_compilation_cache_dir": str(directory),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in names}
  for name, value in names.items():
    jax.config.update(name, value)
  # jax looks at the directory once, when it first compiles: that may be past.
  jax_cache.reset_cache()
  yield directory
  for name, value in before.items():
    jax.config.update(name, value)
  jax_cache.reset_cache()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> str:
  """Where the corpus is tokenized, once for all tests here."""
  return str(tmp_path_factory.mktemp("data_cache"))


@pytest.fixture
def states(monkeypatch):
  """The state of each run that ends, in place of its evaluation and sample."""
  ended = []

  def end(run, reporter):
    ended.append(jax.device_get({k: run.state[k] for k in ("params", "opt_state")}))
    return {"status": "done", "exit_code": 0, "start": run.start_step}

  monkeypatch.setattr(finish, "finish", end)
  return ended


class Killed(BaseException):
  """As by a signal that nothing answers."""


def kill_at(monkeypatch, step: int) -> None:
  """Ends a run after a step, before anything of that step is saved."""
  agreed = loop._agreed

  def check(stop, number, *arguments, **named):
    if number == step:
      raise Killed
    return agreed(stop, number, *arguments, **named)

  monkeypatch.setattr(loop, "_agreed", check)


def make_batch(seed: int, batch: int = 8, length: int = 32) -> dict[str, np.ndarray]:
  """Random tokens; rows differ in how much of them is padding."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 256, (batch, length + 1), dtype=np.int32)
  valid = rng.integers(length // 2, length + 1, (batch, 1), dtype=np.int32)
  position = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
  return {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segment_ids": (position < valid).astype(np.int32),
    "positions": np.ascontiguousarray(position),
  }
