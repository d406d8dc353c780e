"""A run looks once at what its train step sends, and says what nobody asked for."""

import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from moejax.config import Config
from moejax.hlo import traffic
from moejax.models.loss import Batch
from moejax.platform import target_platform
from moejax.train.state import State
from moejax.train.step import Metrics

StepFn = Callable[[State, Batch], tuple[State, Metrics]]


def watched(
  train_step: Any, config: Config, mesh: Mesh, config_flags: str = ""
) -> StepFn:
  """The step, compiled at its first call, when its program is looked at.

  Compiled once, ahead of time, since only so the program's text can be had. On one
  device nothing is sent, and the step is returned as it is.

  Args:
    train_step: from `step.make_train_step`.
    config: of the run.
    mesh: in scope when the step is called.
    config_flags: what gives another program this config.
  """
  if mesh.size == 1:
    return train_step
  compiled: list[Any] = []

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    if not compiled:
      compiled.append(train_step.lower(state, batch).compile())
      if jax.process_index() == 0:
        warn(compiled[0], config, mesh, config_flags)
    return compiled[0](state, batch)

  return step


def warn(compiled: Any, config: Config, mesh: Mesh, config_flags: str = "") -> None:
  """One warning if the program holds a collective that nothing asks for.

  Never ends the run: a text that cannot be read is worth a line for debugging.
  """
  begin = time.monotonic()
  try:
    rows = traffic.rows_of(
      config, compiled.as_text(), mesh.devices.shape, target_platform()
    )
  except Exception as error:
    logging.debug("What the step sends could not be read: %r", error)
    return
  command = f"python -m tools.collectives {config_flags} --devices={mesh.size}"
  if text := traffic.complaint(rows, command):
    logging.warning("%s", text)
  seconds = time.monotonic() - begin
  logging.debug("Read what the step sends: %d rows in %.2f s.", len(rows), seconds)
