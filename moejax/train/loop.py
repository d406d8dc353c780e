"""The training loop.

    set up -> steps, with evaluation and checkpoints now and then -> finish

A step is named by the number of steps done after it: `step` 100 in metrics.jsonl
and checkpoint 100 both mean that one hundred batches were used. The data, the
randomness and the learning rate of a step depend on the state alone, so a run
that was stopped and one that was not are the same, bit for bit.

Extending a finished run by a larger num_steps goes on from its last state. The
schedules that know the end of the run (cosine, linear, constant_decay) are then
those of the longer run from there on: the rate jumps back up. inverse_sqrt does
not.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moejax.config import Config
from moejax.evaluate import groups
from moejax.run import workdir as workdir_lib
from moejax.run.progress import Reporter, first_call, make_reporter, watched
from moejax.run.signals import StopRequest
from moejax.sharding import rules
from moejax.train import finish, validation, wire
from moejax.train import setup as setup_lib
from moejax.train import step as step_lib
from moejax.train.setup import Run
from moejax.train.step_log import StepLog


def train(
  config: Config,
  workdir: pathlib.Path,
  *,
  init_from: str = "",
  devices: Sequence[Any] | None = None,
  stream: Any = None,
  ignore_memory: bool = False,
  config_flags: str = "",
) -> dict[str, Any]:
  """Trains, or goes on training, the run in a directory.

  Args:
    config: validated.
    workdir: holds or will hold config.json, metrics.jsonl, checkpoints and the rest.
    init_from: directory of a run whose parameters a new run starts from.
    devices: jax devices to train on; all of them if None.
    stream: where progress goes; standard output if None.
    ignore_memory: start even if the run cannot fit into memory; see `cost.memory`.
    config_flags: what gives another program this config, for a warning that
      names one.

  Returns:
    `step` (steps done), `status` (done, already_done or stopped) and `exit_code`
    (0, or 128 + signal when stopped); after a finished run also what eval.json has.

  Raises:
    UserError: something the user can mend, before the first step.
    TrainingStopped: `train.max_bad_steps` non-finite steps in a row.
  """
  workdir = pathlib.Path(workdir)
  index = jax.process_index()
  reporter = make_reporter(config.train.num_steps, process_index=index, stream=stream)
  try:
    run = setup_lib.set_up(config, workdir, init_from, devices, reporter, ignore_memory)
    return _train(run, reporter, config_flags)
  finally:
    reporter.close()
    workdir_lib.release(workdir)


def _train(run: Run, reporter: Reporter, config_flags: str) -> dict[str, Any]:
  config, workdir = run.config, run.workdir
  stop = StopRequest(_leaving_time(config))
  try:
    if run.start_step >= config.train.num_steps:
      return finish.already_done(run, reporter)
    if run.model.moe_layers and not run.model.router.causal:
      reporter.message(
        f"Note: router {config.moe.router} lets a token see later ones of its group, so "
        "this loss is not that of a model that could generate."
      )
    if run.resumed:
      reporter.message(f"Resuming {workdir} at step {run.start_step}.")
    with stop, jax.set_mesh(run.mesh):
      step = fit(run, reporter, stop, config_flags)
    run.checkpointer.wait()
    if stop.signal is None:
      return finish.finish(run, reporter)
    saved = run.checkpointer.latest()
    reporter.message(
      f"Stopped at step {step} of {config.train.num_steps}. The same command goes on "
      + ("from the start." if saved is None else f"from checkpoint {saved} in {workdir}.")
    )
    return {"step": step, "status": "stopped", "exit_code": stop.exit_code}
  finally:
    run.checkpointer.close()


def fit(run: Run, reporter: Reporter, stop: StopRequest, config_flags: str = "") -> int:
  """Takes the run's remaining steps. Returns the number of steps done.

  On the way it keeps `run.state` up to date, so that a caller always has the
  state that belongs to the returned step.
  """
  config, start, end = run.config.train, run.start_step, run.config.train.num_steps
  train_step = step_lib.make_train_step(
    run.model, run.optimizer, run.config, run.mesh, token_bytes=run.token_bytes
  )
  train_step = wire.watched(train_step, run.config, run.mesh, config_flags)
  train_step = first_call(train_step, "compiling the train step", reporter)
  evaluate = make_evaluate(run, reporter)
  evaluate = first_call(evaluate, "evaluating for the first time (compiles)", reporter)
  log = StepLog(run, reporter)
  batches = train_batches(run)
  step = start
  reporter.update(step, {})
  try:
    while step < end:
      batch = step_lib.to_devices(next(batches), run.mesh)
      run.state, device_metrics = train_step(run.state, batch)
      step += 1
      # Step n-1's metrics are read after step n was started: the device never
      # waits for the host.
      log.add(step, device_metrics)
      run.checkpointer.poll()
      stopping = _agreed(stop, step, config.log_every, is_last=step == end)
      leaving = stopping or step == end
      # A run told to stop may have seconds: it saves and does not evaluate.
      evaluates = not stopping and (step == end or _every(step, config.eval_every))
      saves = _every(step, config.checkpoint_every) or leaving
      if not (evaluates or saves):
        continue
      log.settle(keep=evaluates)
      loss = log.evaluation(step, evaluate()) if evaluates else None
      if saves:
        log.flush()
        _save(run, step, loss)
      if leaving:
        break
      log.resume()
  finally:
    log.close()
    _close(batches)
  return step


def train_batches(run: Run) -> Iterator[dict[str, np.ndarray]]:
  """This process's rows of every global batch from the run's first step on."""
  return run.dataset.train_batches(
    run.config.train.batch_size,
    run.config.train.seed,
    start_step=run.start_step,
    rows=rules.local_rows(run.mesh, run.config.train.batch_size),
  )


def make_evaluate(run: Run, reporter: Reporter):
  """() -> validation metrics of the run's current parameters, or None without data."""
  config, factor = run.config, run.config.moe.eval_capacity_factor
  num_tokens = run.dataset.num_tokens("validation")
  if not num_tokens:
    return lambda limit=0: None
  model = groups.make_model(config, run.dataset.tokenizer.vocab_size)
  eval_step = step_lib.make_eval_step(
    model, run.mesh, factor, token_bytes=run.token_bytes
  )
  batch_size = groups.batch_size(config, run.mesh, (factor,))
  rows = rules.local_rows(run.mesh, batch_size)

  def evaluate(limit: int = config.train.eval_batches) -> dict[str, Any] | None:
    covered = limit * batch_size * config.data.sequence_length or num_tokens
    covered = min(covered, num_tokens)
    batches = run.dataset.eval_batches("validation", batch_size, limit=limit, rows=rows)
    with watched(reporter, "validation, tokens", covered) as progress:
      values = validation.evaluate(
        eval_step, run.state["params"], batches, run.mesh, progress
      )
    # So that whoever reads the loss can say what it is of.
    return None if values is None else values | {"split_tokens": num_tokens}

  return evaluate


def _save(run: Run, step: int, loss: float | None) -> None:
  position = {"step": step, "seed": run.config.train.seed}
  run.checkpointer.save(step, run.state, position=position, metric=loss)


def _every(step: int, interval: int) -> bool:
  return interval > 0 and step % interval == 0


def _leaving_time(config: Config) -> str:
  """When a run that is told to leave does so; see `_agreed`."""
  if jax.process_count() == 1:
    return "after this step"
  return (
    f"at the next step that --config.train.log_every={config.train.log_every} divides"
  )


def _agreed(stop: StopRequest, step: int, interval: int, *, is_last: bool) -> bool:
  """Whether any process was asked to stop: all must leave at the same step.

  Asking the others waits for them, so with several processes it is done only
  every `interval` steps, and after the last one.
  """
  if jax.process_count() == 1:
    return stop.signal is not None
  if not (is_last or _every(step, interval)):
    return False
  from jax.experimental import multihost_utils

  asked = np.asarray(0 if stop.signal is None else stop.signal, np.int32)
  signals = np.asarray(multihost_utils.process_allgather(asked))
  if signals.max() > 0 and stop.signal is None:
    stop.signal = int(signals.max())
  return stop.signal is not None


def _close(iterator: Any) -> None:
  close = getattr(iterator, "close", None)
  if close is not None:
    close()
