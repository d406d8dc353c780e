"""The steps of a long run that get a log line, and the size of the logs. Pure.

The first `FULL` lines are `train.log_every` steps apart. After that, the interval doubles
whenever the number of steps has doubled: a run of twice the length has `FULL` / 2 more
lines, so a million steps give about 24,000 lines, whatever `train.log_every` is. A line
is written at once or never. Whether a step has one depends on the step alone, so a
resumed run logs the same steps.
"""

from moejax.config import Config

FULL = 5_000
"""Lines before the interval doubles for the first time."""

_LINE_BYTES = 420
"""Bytes of a line of metrics.jsonl, not counting layers."""
_LAYER_BYTES = 12 * 8
"""Bytes of the numbers of one MoE layer, about a dozen."""
_LOAD_BYTES = 9
_EVENT_BYTES = 60
"""Bytes of a scalar in TensorBoard's file."""
_EVENTS = 40
_BUCKET_BYTES = 16
"""Bytes of an expert in a histogram."""


def interval(step: int, log_every: int) -> int:
  """Returns the steps between log lines at a step: `log_every` times a power of 2."""
  return log_every << (-(-step // (log_every * FULL)) - 1).bit_length()


def is_due(step: int, log_every: int) -> bool:
  """Returns whether a step, at least 1, gets a line even if nothing happens in it."""
  return step % interval(step, log_every) == 0


def num_lines(num_steps: int, log_every: int) -> int:
  """Returns how many of the steps 1 to `num_steps` are due."""
  end, every = min(num_steps, log_every * FULL), log_every
  total = end // every
  while end < num_steps:
    begin, end, every = end, min(num_steps, 2 * end), 2 * every
    total += end // every - begin // every
  return total


def num_bytes(config: Config) -> int:
  """Returns the approximate bytes of a whole run's logs, including TensorBoard's.

  In addition to the lines that are due, each evaluation, changed alarm and skipped step
  gets a line; of these, only evaluations are counted.
  """
  train, moe = config.train, config.moe
  lines = num_lines(train.num_steps, train.log_every)
  if train.eval_every:
    lines += train.num_steps // train.eval_every
  layers = config.model.num_layers // moe.every
  loads = layers * moe.num_experts
  # As many as a line may have; see `metrics.MAX_LOAD_NUMBERS`.
  loads = loads if loads <= 1024 else 5 * layers
  line = _LINE_BYTES + layers * _LAYER_BYTES + loads * _LOAD_BYTES
  if train.tensorboard:
    line += _EVENTS * _EVENT_BYTES + loads * _BUCKET_BYTES
  return lines * line
