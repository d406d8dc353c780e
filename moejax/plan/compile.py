"""Compiles the real train step for devices that need not exist.

Nothing is allocated: the state and the batch are shapes with shardings. A run builds its
step with the same functions (`moejax.train`), so the program measured here is the one
that would run.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from moejax.config import Config
from moejax.config import devices as config_devices
from moejax.cost.parameters import resolve_vocab_size
from moejax.models.loss import batch_shapes
from moejax.models.make import make_model
from moejax.sharding import rules
from moejax.sharding.mesh import make_mesh
from moejax.train import state as state_lib
from moejax.train import step as step_lib
from moejax.train.optimizer import make_optimizer
from moejax.train.state import State


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """A compiled train step."""

  mesh: Mesh
  state: State
  """ShapeDtypeStructs with shardings."""
  compiled: Any
  """jax.stages.Compiled."""
  seconds: float
  """Time to lower and compile, without tracing."""


def compile_step(config: Config, devices: Sequence[Any]) -> CompiledStep:
  """Compiles a train step for devices, real or described.

  Raises:
    ConfigError: the config does not fit this number of devices.
  """
  config_devices.validate_devices(config, len(devices))
  mesh = make_mesh(config.mesh, devices)
  model = make_model(
    config.model,
    config.moe,
    vocab_size=resolve_vocab_size(config),
    frozen=config.train.frozen,
  )
  optimizer = make_optimizer(
    config.optimizer,
    num_steps=config.train.num_steps,
    axes=model.logical_axes(),
    trained=model.trained(),
  )
  batch = {
    name: jax.ShapeDtypeStruct(shape, "int32", sharding=rules.batch_sharding(mesh))
    for name, shape in batch_shapes(config).items()
  }
  with jax.set_mesh(mesh):
    step: Any = step_lib.make_train_step(model, optimizer, config, mesh)
    state = state_lib.state_shapes(model, optimizer, mesh)
    traced = step.trace(state, batch)
    start = time.monotonic()
    lowered = traced.lower()
    compiled = lowered.compile()
  return CompiledStep(mesh, state, compiled, time.monotonic() - start)
