"""Traces a few steps of a run near its end, for the bar in report.png.

They are steps of training, not extra ones, so the bar shows a run as it was: the host's
work between steps included, evaluations and checkpoints left out. With several processes
the first one traces its own devices. A trace changes no number of the run, and whatever
goes wrong with it costs the bar, not the run.
"""

import contextlib
import dataclasses
import pathlib
import tempfile
import time
from typing import Any

import jax

from moejax.config.schema import TrainConfig
from moejax.hlo import timeline
from moejax.models.loss import Batch
from moejax.run import results
from moejax.run.progress import Reporter
from moejax.train.setup import Run

_WARM_UP = 2
"""Steps of this process before a trace: the first one compiles."""


def window(
  config: TrainConfig, start: int, emergency_every: int = 0
) -> tuple[int, int] | None:
  """Returns (steps done when the trace begins, when it ends); None if none fits.

  These are the last steps of the run with no evaluation or checkpoint between them. The
  very last step is excluded, since it ends with both.

  Args:
    config: of the run.
    start: steps done before this process began.
    emergency_every: steps between emergency checkpoints; 0 means none.
  """
  length = config.trace_steps
  intervals = (config.eval_every, config.checkpoint_every, emergency_every)
  pauses = [every for every in intervals if every]
  if not length or any(every < length for every in pauses):
    return None
  for first in range(config.num_steps - 1 - length, start + _WARM_UP - 1, -1):
    inner = range(first + 1, first + length)
    if not any(step % every == 0 for step in inner for every in pauses):
      return first, first + length
  return None


class StepTrace:
  """Starts a trace before one step of a run and ends it before another."""

  def __init__(self, run: Run, train_step: Any, reporter: Reporter):
    """Prepares a trace of `train_step`, the jitted function of `step.make_train_step`."""
    config = run.config.train
    writes = config.report and jax.process_index() == 0
    local = 0 if run.emergency is None else run.emergency.every
    self._window = window(config, run.start_step, local) if writes else None
    self._run, self._train_step, self._reporter = run, train_step, reporter
    # Set while our trace runs; not while another's does, which is not ours to stop.
    self._directory: tempfile.TemporaryDirectory[str] | None = None
    self._began = 0.0

  def due(self, step: int) -> bool:
    """Returns whether a trace begins or ends when `step` steps are done."""
    return self._window is not None and step in self._window

  def take(self, step: int, batch: Batch) -> None:
    """Begins or ends the trace; ending takes seconds.

    Args:
      step: steps done, for which `due` is True.
      batch: of the next step.
    """
    assert self._window is not None
    try:
      # The trace must not contain a part of a step.
      jax.block_until_ready(self._run.state)
      if step == self._window[0]:
        self._begin()
      elif self._directory is not None:
        self._end(self._directory, batch)
    # Profilers fail in many ways: another one runs, no space, no support.
    except Exception as error:
      self.close()
      reason = (str(error).splitlines() or [type(error).__name__])[0]
      self._reporter.message(f"Note: report.png does not show where time goes: {reason}")

  def close(self) -> None:
    """Abandons a trace that did not end."""
    self._window = None
    if self._directory is not None:
      with contextlib.suppress(Exception):
        jax.profiler.stop_trace()
      self._directory.cleanup()
      self._directory = None

  def _begin(self) -> None:
    directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    options = timeline.trace_options()
    try:
      jax.profiler.start_trace(directory.name, profiler_options=options)
    except BaseException:
      directory.cleanup()
      raise
    self._directory = directory
    self._began = time.perf_counter()

  def _end(self, directory: tempfile.TemporaryDirectory[str], batch: Batch) -> None:
    assert self._window is not None
    first, after = self._window
    step_ms = 1e3 * (time.perf_counter() - self._began) / (after - first)
    jax.profiler.stop_trace()
    # jax still has the program of these arguments: nothing is compiled.
    text = self._train_step.lower(self._run.state, batch).compile().as_text()
    devices = timeline.of_steps(
      text, pathlib.Path(directory.name), num_steps=after - first, step_ms=step_ms
    )
    values = {
      "first_step": first + 1,
      "num_steps": after - first,
      "step_ms": step_ms,
      "devices": [dataclasses.asdict(device) for device in devices],
    }
    results.write(self._run.workdir / results.STEP_TIME_FILE, values)
    directory.cleanup()
    self._directory = None
