"""How fast the data pipeline is, alone: python -m tools.benchmark_data

Makes batches as training would and throws them away: tokens per second, in
interleaved rounds of several settings (threads or workers, process counts), with
quartiles. Beside it what the model consumes, from --model_tokens_per_second or
from the metrics.jsonl of a run, and the ratio of the two; with --at_least the exit
code says whether the slowest setting reaches it.
"""

import json
import os
import statistics
import time
from pathlib import Path

from absl import flags

from moejax.cli import flags as cli
from moejax.errors import UserError

_SECONDS = flags.DEFINE_float(
  "seconds", 1.0, "Length of one round.", lower_bound=0, upper_bound=86_400
)
_ROUNDS = flags.DEFINE_integer(
  "rounds", 5, "Rounds per setting.", lower_bound=2, upper_bound=100_000
)
_WORKERS = flags.DEFINE_list("workers", ["0"], "Settings of --config.data.num_workers.")
_MODEL = flags.DEFINE_float(
  "model_tokens_per_second",
  0.0,
  "Tokens per second that the model consumes; 0 reads them from --run.",
  lower_bound=0,
  upper_bound=1e15,
)
_RUN = flags.DEFINE_string(
  "run", "", "Directory of a run, whose median tokens_per_second is used."
)
_AT_LEAST = flags.DEFINE_float(
  "at_least",
  0.0,
  "Fail below this multiple of the model's speed.",
  lower_bound=0,
  upper_bound=1e9,
)
_JSON = flags.DEFINE_string("json", "", "Write the rows to this file.")


def model_speed(run: Path) -> float:
  """Median of tokens_per_second over a run's logged steps, the first left out.

  Raises:
    UserError: there is no metrics.jsonl with such a number.
  """
  path = run / "metrics.jsonl"
  try:
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
  except (OSError, ValueError) as e:
    raise UserError(f"--run={str(run)!r}: cannot read metrics.jsonl: {e}") from e
  speeds = [x["tokens_per_second"] for x in lines if x.get("tokens_per_second")]
  if not speeds:
    raise UserError(f"--run={str(run)!r}: no tokens_per_second in metrics.jsonl.")
  # The first steps hold the compile.
  return statistics.median(speeds[1:] or speeds)


def _workers() -> list[int]:
  texts = _WORKERS.value
  if not texts or not all(t.isdigit() and int(t) <= 1024 for t in texts):
    raise UserError(
      f"--workers={','.join(texts)}: give whole numbers from 0 to 1,024, such as 0,2."
    )
  return [int(text) for text in texts]


def measure(batches, batch_tokens: int, seconds: float) -> float:
  """Tokens per second of an iterator over at least `seconds`."""
  count, began = 0, time.perf_counter()
  while (elapsed := time.perf_counter() - began) < seconds:
    next(batches)
    count += 1
  return count * batch_tokens / elapsed


def main() -> int:
  """Runs the settings in turn and prints one line for each."""
  import dataclasses

  from moejax.data import load

  config = cli.get_config()
  size, length = config.train.batch_size, config.data.sequence_length
  model = _MODEL.value or (model_speed(Path(_RUN.value)) if _RUN.value else 0.0)
  iterators = {}
  for workers in _workers():
    data = dataclasses.replace(config.data, num_workers=workers)
    began = time.perf_counter()
    batches = load(data).train_batches(size, config.train.seed)
    next(batches)
    iterators[workers] = (batches, time.perf_counter() - began)
  speeds: dict[int, list[float]] = {w: [] for w in iterators}
  for _ in range(_ROUNDS.value):
    for workers, (batches, _) in iterators.items():
      speeds[workers].append(measure(batches, size * length, _SECONDS.value))
  rows = []
  for workers, (batches, first) in iterators.items():
    batches.close()
    q1, median, q3 = statistics.quantiles(speeds[workers], n=4, method="inclusive")
    row = {
      "data": config.data.name,
      "tokenizer": config.data.tokenizer,
      "batch": f"{size}x{length}",
      "workers": workers,
      "tokens_per_second": round(median),
      "q1": round(q1),
      "q3": round(q3),
      "first_batch_seconds": round(first, 3),
      "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
      "times_model": round(median / model, 1) if model else None,
    }
    rows.append(row)
    print("  ".join(f"{k} {v}" for k, v in row.items()))
  if _JSON.value:
    Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
  if _AT_LEAST.value:
    if not model:
      raise UserError("--at_least needs --model_tokens_per_second or --run.")
    slowest = min(r["tokens_per_second"] for r in rows) / model
    print(f"{slowest:.1f} times the model's speed; at least {_AT_LEAST.value:g} wanted")
    return 0 if slowest >= _AT_LEAST.value else 1
  return 0


if __name__ == "__main__":
  cli.define_config()
  cli.run(main)
