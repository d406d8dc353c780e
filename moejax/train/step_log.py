"""Logs the metrics of a run's steps, read one step late."""

import dataclasses
import functools
import time
from typing import Any

import jax

from moejax.alarms.measures import Numbers, router_numbers
from moejax.alarms.watch import Watch
from moejax.launch import hang
from moejax.run import log_lines, metrics, writers
from moejax.run import workdir as workdir_lib
from moejax.run.progress import Reporter
from moejax.train.setup import Run
from moejax.train.step import StepMetrics


class TrainingStopped(Exception):
  """The run cannot go on: too many non-finite steps in a row."""


@dataclasses.dataclass
class _Speed:
  """Training tokens and seconds since the last logged step, without pauses."""

  tokens: float = 0.0
  seconds: float = 0.0
  since: float | None = None

  def add(self, tokens: float) -> None:
    now = time.monotonic()
    # The first step after a start is not timed: it compiles.
    if self.since is not None:
      self.tokens += tokens
      self.seconds += now - self.since
    self.since = now

  def reset(self) -> None:
    self.tokens = self.seconds = 0.0


class StepLog:
  """Reads metrics one step late and logs them; stops a run that diverged."""

  def __init__(self, run: Run, reporter: Reporter):
    self._run, self._reporter = run, reporter
    self._pending: tuple[int, StepMetrics] | None = None
    # Held back so that an evaluation of the same step can be added.
    self._line: tuple[int, dict[str, Any]] | None = None
    self._alarms_changed = False
    self._speed = _Speed()
    self._device_kind = jax.devices()[0].device_kind
    self._writers: list[writers.Writer] = []
    if jax.process_index() == 0:
      self._writers = writers.make_writers(
        run.workdir,
        resume_step=run.start_step,
        tensorboard=run.config.train.tensorboard,
      )
    for writer in self._writers:
      if run.emergency is not None and isinstance(writer, writers.LineWriter):
        writer.put_back(run.emergency.late_lines)

  @functools.cached_property
  def _watch(self) -> Watch:
    stacks = self._run.model.stacks.values()
    routers = [stack.router for stack in stacks for _ in stack.moe_layers]
    watch = Watch(self._run.config, routers, self._run.model.moe_layers)
    if self._run.start_step:
      lines = writers.read(self._run.workdir / writers.METRICS_FILE)
      # Another process may not yet have cut the lines after the step of the checkpoint.
      before = [line for line in lines if line["step"] <= self._run.start_step]
      watch.go_on(next((l for l in reversed(before) if "alarms_raised" in l), {}))
    return watch

  def add(self, step: int, device_metrics: StepMetrics) -> None:
    """Takes the metrics of the step just started; reads those of the previous one."""
    previous, self._pending = self._pending, (step, device_metrics)
    if previous is not None:
      self._read(*previous)

  def settle(self, *, keep: bool) -> None:
    """Reads pending metrics. `keep`: log this step regardless of log_every."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      self._read(*pending, keep=keep)

  def flush(self) -> None:
    """Makes every line durable; called before a checkpoint of the same step is saved.

    Raises:
      UserError: the run's directory was removed.
    """
    workdir_lib.check_there(self._run.workdir)
    self._write_line()
    for writer in self._writers:
      writer.flush()

  def late(self) -> list[str]:
    """Returns lines that `flush` could not make durable, for example on a full disk."""
    kept = [w for w in self._writers if isinstance(w, writers.LineWriter)]
    return [line for writer in kept for line in writer.late()]

  def resume(self) -> None:
    """Restarts the clock after an evaluation or a checkpoint."""
    self._speed.since = time.monotonic()

  def evaluation(self, step: int, values: dict[str, Any] | None) -> float | None:
    """Adds validation metrics to the step's own; returns the validation loss."""
    if values is not None:
      named = {f"validation_{k}": v for k, v in values.items() if k != "moe"}
      self._line = (step, {**self._line[1], **named} if self._line else named)
      self._reporter.update(step, named)
    # Written now: if no checkpoint follows, the next line would replace it.
    self._write_line()
    return None if values is None else values["loss"]

  def close(self) -> None:
    try:
      self._write_line()
    finally:
      for writer in self._writers:
        writer.close()

  def _read(self, step: int, device_metrics: StepMetrics, *, keep: bool = False) -> None:
    found = jax.device_get(device_metrics)
    hang.progress()
    self._speed.add(float(found.sums.tokens))
    config = self._run.config.train
    in_a_row = int(found.bad_in_a_row)
    shown: dict[str, Any] = {}
    if keep or step % config.log_every == 0 or step == config.num_steps or in_a_row:
      shown = self._values(step, found)
      self._speed.reset()
      notable = keep or step == config.num_steps or in_a_row or self._alarms_changed
      if notable or log_lines.is_due(step, config.log_every):
        self._line = (step, shown)
      if not keep:
        self._write_line()
    self._reporter.update(step, shown)
    if in_a_row >= config.max_bad_steps:
      raise TrainingStopped(self._verdict(step, in_a_row))

  def _values(self, step: int, found: StepMetrics) -> dict[str, Any]:
    values: dict[str, Any] = metrics.loss_metrics(found.sums)
    values["grad_norm"] = float(found.grad_norm)
    values["learning_rate"] = float(found.learning_rate)
    values["skipped_steps"] = int(found.bad_total)
    values |= metrics.speed_metrics(
      self._speed.tokens,
      self._speed.seconds,
      flops_per_token=self._run.flops_per_token,
      num_devices=self._run.mesh.size,
      device_kind=self._device_kind,
    )
    if metrics.has_experts(found.sums.stats):
      layers = metrics.layer_metrics(found.sums.stats)
      if found.health is not None:
        layers |= self._alarms(step, found, values)
      values["moe"] = metrics.layers_for_log(layers)
    return values

  def _alarms(self, step: int, found: StepMetrics, values: dict[str, Any]) -> Numbers:
    """Adds the alarms to a line's values; returns the numbers they check, per layer."""
    stats, watch = found.sums.stats, self._watch
    assert stats is not None
    numbers = router_numbers(stats, found.health, watch.routers)
    weights = self._run.model.aux_weights
    aux = {name: weight * values[name] for name, weight in weights.items()}
    before = watch.raised, watch.active.keys()
    for line in watch.update(step, stats, numbers, aux=aux, loss=values["loss"]):
      self._reporter.message(line)
    self._alarms_changed = before != (watch.raised, watch.active.keys())
    values["alarms_active"] = len(watch.active)
    values["alarms_raised"] = watch.raised
    if watch.active:
      values["alarms"] = watch.active
    return numbers

  def _write_line(self) -> None:
    if self._line is not None:
      step, values = self._line
      for writer in self._writers:
        writer.write(step, values)
      self._line = None

  def _verdict(self, step: int, in_a_row: int) -> str:
    self._run.checkpointer.wait()
    latest = self._run.checkpointer.latest()
    where = self._run.workdir / "checkpoints"
    good = "none was saved yet" if latest is None else f"{where / str(latest)}"
    return (
      f"The loss or a gradient was not finite in {in_a_row} steps in a row "
      f"(--config.train.max_bad_steps), up to step {step}. Last good checkpoint: {good}. "
      "Lower --config.optimizer.learning_rate or --config.optimizer.clip_norm and start "
      "again in a new --workdir, with --init_from to begin from that checkpoint."
    )
