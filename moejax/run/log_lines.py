"""Which steps of a long run get a line in its log, and how large the logs become. Pure.

The first `FULL` lines are `train.log_every` steps apart. From there on the interval
doubles whenever the number of steps has: a run of twice the length has `FULL` / 2 lines
more, so that a million steps give about 24,000 lines, however often is logged. A line is
written at once or never, and which steps have one depends on the step alone, so that a
resumed run logs the same ones.
"""

from moejax.config import Config

FULL = 5_000
"""Lines before the interval doubles for the first time."""

_LINE_BYTES = 420
"""Of a line of metrics.jsonl without any layer."""
_LAYER_BYTES = 12 * 8
"""The numbers of one MoE layer, about a dozen."""
_LOAD_BYTES = 9
_EVENT_BYTES = 60
"""Of a scalar in TensorBoard's file."""
_EVENTS = 40
_BUCKET_BYTES = 16
"""Of an expert in a histogram."""


def interval(step: int, log_every: int) -> int:
  """Returns the steps between two lines around a step: `log_every` times a power of 2."""
  return log_every << (-(-step // (log_every * FULL)) - 1).bit_length()


def is_due(step: int, log_every: int) -> bool:
  """Returns whether a step, at least 1, has a line of its own accord."""
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
  """Returns about how many bytes the logs of a whole run have, TensorBoard's included.

  Lines with an evaluation, an alarm that changes or a step that was skipped come on top
  of those that are due; only evaluations are counted.
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
