"""The training loop.

    set up -> steps, with periodic evaluation and checkpoints -> finish

A step is numbered by the steps completed after it: `step` 100 in metrics.jsonl and
checkpoint 100 both mean that one hundred batches were used. The data, randomness and
learning rate of a step depend only on the state, so an interrupted and an
uninterrupted run are bit-identical.

A finished run given a larger num_steps continues from its last state. Schedules that
depend on the end of the run (cosine, linear, constant_decay) then follow those of the
longer run: the learning rate jumps back up. With inverse_sqrt it does not.
"""

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moejax.config import Config
from moejax.config.spans import target_length
from moejax.data.packing import Batch
from moejax.errors import UserError
from moejax.evaluate import groups
from moejax.launch import preemption
from moejax.models.loss import to_devices
from moejax.run import workdir as workdir_lib
from moejax.run.emergency_dir import Wish
from moejax.run.progress import Reporter, first_call, make_reporter, watched
from moejax.run.signals import StopRequest
from moejax.sharding import rules
from moejax.storage import errors as storage_errors
from moejax.storage.paths import RunPath, run_path
from moejax.train import finish, step_trace, validation, wire
from moejax.train import setup as setup_lib
from moejax.train import step as step_lib
from moejax.train.setup import Run
from moejax.train.step_log import StepLog


def train(
  config: Config,
  workdir: RunPath,
  *,
  init_from: str = "",
  devices: Sequence[Any] | None = None,
  stream: Any = None,
  ignore_memory: bool = False,
  config_flags: str = "",
  emergency: Wish | None = None,
) -> dict[str, Any]:
  """Starts or resumes the training run in a directory.

  Args:
    config: validated.
    workdir: directory of config.json, metrics.jsonl, checkpoints and other files.
    init_from: directory of a run whose parameters a new run starts from.
    devices: jax devices to train on; None means all.
    stream: where progress is printed; None means standard output.
    ignore_memory: start even if the run cannot fit into memory; see `cost.memory`.
    config_flags: flags that give another program this config, for a warning.
    emergency: checkpoints on this machine's own disk, between those of `workdir`.

  Returns:
    `step` (steps done), `status` (done, already_done or stopped) and `exit_code`
    (0, or 128 + signal when stopped); for a finished run also the content of eval.json.

  Raises:
    UserError: an error the user can fix, before the first step.
    TrainingStopped: `train.max_bad_steps` non-finite steps in a row.
  """
  workdir = run_path(workdir)
  index = jax.process_index()
  reporter = make_reporter(config.train.num_steps, process_index=index, stream=stream)
  try:
    with storage_errors.explained(workdir), workdir_lib.still_there(workdir):
      run = setup_lib.set_up(
        *(config, workdir, init_from, devices, reporter, ignore_memory, emergency)
      )
      return _train(run, reporter, config_flags)
  finally:
    reporter.close()
    workdir_lib.release(workdir)


def _train(run: Run, reporter: Reporter, config_flags: str) -> dict[str, Any]:
  config, workdir = run.config, run.workdir
  notice = preemption.notice()
  stop = StopRequest(_leaving_time(config), notice)
  try:
    if run.start_step >= config.train.num_steps:
      if run.emergency is not None:
        run.emergency.clear()
      return finish.already_done(run, reporter)
    if run.model.moe_layers and not run.model.router.causal:
      reporter.message(
        f"Note: router {config.moe.router} lets tokens see later ones of their group, "
        "so this loss is not that of a model that could generate."
      )
    if run.resumed:
      reporter.message(f"Resuming {workdir} at step {run.start_step}.")
    with stop, jax.set_mesh(run.mesh):
      step = fit(run, reporter, stop, config_flags)
    run.checkpointer.wait()
    saved = run.checkpointer.latest()
    # Again, for a signal since the last step's check. From here on it ends the process.
    if not (_noticed(stop) or _any_asked(stop)):
      _check_saved(run, step, saved)
      if run.emergency is not None:
        run.emergency.clear()
      return finish.finish(run, reporter)
    reporter.message(
      f"Stopped at step {step} of {config.train.num_steps}. The same command continues "
      + ("from the start." if saved is None else f"from checkpoint {saved} in {workdir}.")
    )
    return {"step": step, "status": "stopped", "exit_code": stop.exit_code}
  finally:
    if run.emergency is not None:
      run.emergency.wait()
    run.checkpointer.close()


def _check_saved(run: Run, step: int, saved: int | None) -> None:
  """Checks that the last step's checkpoint exists; without it a run is not done.

  Raises:
    UserError: its save failed, for example on a full disk.
  """
  why = dict(run.checkpointer.failures).get(step)
  if saved == step or why is None:
    return
  where = "the start" if saved is None else f"checkpoint {saved}"
  raise UserError(
    f"--workdir={run.workdir}: the last checkpoint, of step {step}, could not be saved "
    f"({why}). Make room, and give the same command again: it continues from {where}."
  )


def fit(run: Run, reporter: Reporter, stop: StopRequest, config_flags: str = "") -> int:
  """Takes the run's remaining steps and returns the number of steps done.

  Updates `run.state` in place, so that it always matches the returned step.
  """
  config, start, end = run.config.train, run.start_step, run.config.train.num_steps
  train_step = step_lib.make_train_step(
    run.model, run.optimizer, run.config, run.mesh, token_bytes=run.token_bytes
  )
  trace = step_trace.StepTrace(run, train_step, reporter)
  train_step = wire.watched(train_step, run.config, run.mesh, config_flags)
  train_step = first_call(train_step, "compiling the train step", reporter)
  evaluate = make_evaluate(run, reporter)
  evaluate = first_call(evaluate, "evaluating for the first time (compiling)", reporter)
  log = StepLog(run, reporter)
  batches = train_batches(run)
  step = start
  reporter.update(step, {})
  try:
    while step < end:
      batch = to_devices(next(batches), run.mesh)
      if trace.due(step):
        log.settle(keep=False)
        trace.take(step, batch)
        log.resume()
      run.state, device_metrics = train_step(run.state, batch)
      step += 1
      # The metrics of step n-1 are read after step n has started, so that the
      # device never waits for the host.
      log.add(step, device_metrics)
      run.checkpointer.poll()
      stopping = _agreed(stop, step, config.log_every, is_last=step == end)
      leaving = stopping or step == end
      # A run told to stop may have only seconds: it saves but does not evaluate.
      evaluates = not stopping and (step == end or _every(step, config.eval_every))
      saves = _every(step, config.checkpoint_every) or leaving
      locally = _saves_locally(run, step, stopping=stopping)
      if not (evaluates or saves or locally):
        continue
      log.settle(keep=evaluates)
      loss = log.evaluation(step, evaluate()) if evaluates else None
      if saves or locally:
        log.flush()
      if locally and run.emergency is not None:
        late = log.late()
        run.emergency.save(step, run.state, _position(run, step), late)
      if saves:
        run.checkpointer.save(step, run.state, position=_position(run, step), metric=loss)
      if leaving:
        break
      log.resume()
  finally:
    trace.close()
    log.close()
    _close(batches)
  return step


def train_batches(run: Run) -> Iterator[Batch]:
  """Yields this process's rows of each global batch, from `run.start_step` on."""
  return run.dataset.train_batches(
    run.config.train.batch_size,
    run.config.train.seed,
    start_step=run.start_step,
    rows=rules.local_rows(run.mesh, run.config.train.batch_size),
  )


def make_evaluate(run: Run, reporter: Reporter):
  """Returns a function that evaluates the current parameters; None without data."""
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
    covered = limit * batch_size * target_length(config.data) or num_tokens
    covered = min(covered, num_tokens)
    batches = run.dataset.eval_batches("validation", batch_size, limit=limit, rows=rows)
    with watched(reporter, "validation, tokens", covered) as progress:
      values = validation.evaluate(
        eval_step, run.state["params"], batches, run.mesh, progress
      )
    # So that a report can say how much of the split the loss covers.
    return None if values is None else values | {"split_tokens": num_tokens}

  return evaluate


def _position(run: Run, step: int) -> dict[str, Any]:
  return {"step": step, "seed": run.config.train.seed}


def _saves_locally(run: Run, step: int, *, stopping: bool) -> bool:
  """Returns whether to save this step to this machine's own disk.

  A run told to stop writes one too, since a bucket may take too long. The last step is
  saved in the run's directory, which must be complete without this disk.
  """
  if run.emergency is None or step == run.config.train.num_steps:
    return False
  return stopping or run.emergency.due(step)


def _every(step: int, interval: int) -> bool:
  return interval > 0 and step % interval == 0


def _leaving_time(config: Config) -> str:
  """Returns, in words, when a run stops after it was told to; see `_agreed`."""
  if jax.process_count() == 1:
    return "after this step"
  return (
    f"at the next step that --config.train.log_every={config.train.log_every} divides"
  )


def _agreed(stop: StopRequest, step: int, interval: int, *, is_last: bool) -> bool:
  """Returns whether any process was asked to stop; all must stop at the same step.

  Without a notice, the check synchronises the processes, so with several of them it is
  done only every `interval` steps and after the last step.
  """
  if _noticed(stop):
    return True
  if jax.process_count() > 1 and not (is_last or _every(step, interval)):
    return False
  return _any_asked(stop)


def _noticed(stop: StopRequest) -> bool:
  """Returns whether jax's service tells all processes to stop at this step."""
  if stop.notice is None or not stop.notice.reached():
    return False
  stop.signal = stop.signal or signal.SIGTERM
  return True


def _any_asked(stop: StopRequest) -> bool:
  """Returns whether any process was asked to stop, the same on all of them."""
  if jax.process_count() == 1:
    return stop.signal is not None
  from jax.experimental import multihost_utils

  asked = np.asarray(0 if stop.signal is None else stop.signal, np.int32)
  signals = np.asarray(multihost_utils.process_allgather(asked))
  # Not by stop.signal: a signal that came meanwhile is known to this process alone, and
  # the others would wait for it in the next step.
  agreed = int(signals.max())
  if agreed and stop.signal is None:
    stop.signal = agreed
  return agreed > 0


def _close(iterator: Any) -> None:
  close = getattr(iterator, "close", None)
  if close is not None:
    close()
