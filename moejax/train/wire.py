"""Checks the compiled train step once for unexpected collectives."""

import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from moejax.config import Config
from moejax.errors import program
from moejax.hlo import traffic
from moejax.models.loss import Batch
from moejax.platform import target_platform
from moejax.train.state import State
from moejax.train.step import StepMetrics

StepFn = Callable[[State, Batch], tuple[State, StepMetrics]]


def watched(
  train_step: Any, config: Config, mesh: Mesh, config_flags: str = ""
) -> StepFn:
  """Wraps the step: compiles it at its first call and checks the program.

  Compiled once, ahead of time, because only this gives access to the program's text.
  With one device nothing is sent, and the step is returned unchanged.

  Args:
    train_step: from `step.make_train_step`.
    config: of the run.
    mesh: in scope when the step is called.
    config_flags: flags that give another program this config.
  """
  if mesh.size == 1:
    return train_step
  compiled: list[Any] = []

  def step(state: State, batch: Batch) -> tuple[State, StepMetrics]:
    if not compiled:
      compiled.append(train_step.lower(state, batch).compile())
      if jax.process_index() == 0:
        warn(compiled[0], config, mesh, config_flags)
    return compiled[0](state, batch)

  return step


def warn(compiled: Any, config: Config, mesh: Mesh, config_flags: str = "") -> None:
  """Logs one warning if the program has collectives without a known purpose.

  Never ends the run: if the program's text cannot be parsed, logs a debug line.
  """
  begin = time.monotonic()
  try:
    rows = traffic.rows_of(
      config, compiled.as_text(), mesh.devices.shape, target_platform()
    )
  except Exception as error:
    logging.debug("What the step sends could not be read: %r", error)
    return
  command = program("collectives", "tools.collectives")
  command += f" {config_flags} --devices={mesh.size}"
  if text := traffic.complaint(rows, command):
    logging.warning("%s", text)
  seconds = time.monotonic() - begin
  logging.debug("Read what the step sends: %d rows in %.2f s.", len(rows), seconds)
