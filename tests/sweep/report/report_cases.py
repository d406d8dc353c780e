"""Runs for the report's tests: records made by hand, and directories as a run leaves."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from moejax.config import Config
from moejax.config import text as config_text
from moejax.sweep.report import records
from moejax.sweep.report.records import Record
from moejax.sweep.report.run_values import Curve

SEED_SHIFT = (0.02, -0.01, 0.005, 0.0)
"""What a seed adds to every loss: paired differences must not see it."""


def make_config(**fields: Any) -> Config:
  """A small config; `moe__num_experts=8` sets moe.num_experts."""
  config = Config()
  config.data.sequence_length, config.train.batch_size = 10, 4
  config.train.num_steps = 20
  for name, value in fields.items():
    dotted = name.replace("__", ".")
    if dotted == "moe.router":  # Before its options.
      config.moe.router = value
    else:
      config_text.set_field(config, dotted, value)
  return config


def record(
  loss: float | None = 3.0,
  *,
  seed: int = 0,
  step_ms: float = 10.0,
  state: str = "done",
  curve: Curve | None = None,
  values: dict[str, Any] | None = None,
  **fields: Any,
) -> Record:
  """One run; `values` replaces columns."""
  config = make_config(**fields)
  config.train.seed = seed
  name = ",".join(f"{k.rpartition('__')[2]}={v}" for k, v in fields.items())
  columns: dict[str, Any] = {
    "run": f"{name},seed={seed}",
    "state": state,
    "seed": seed,
    "steps": 20,
    "num_steps": 20,
    "loss": loss,
    "step_ms_p50": step_ms,
    "step_time_source": "timed",
    "active_parameters": 1000,
    "flops_per_token": 6000.0,
    "training_flops": 6e12,
    "eval_tokens": 5000,
    "dropped_tail": 0.1,
  } | (values or {})
  return Record(
    path=pathlib.Path(name),
    config=config,
    values={k: v for k, v in columns.items() if v is not None},
    evaluations={},
    curve=curve or Curve(),
  )


def seeds(mean: float, spread: Sequence[float], **fields: Any) -> list[Record]:
  """One run per seed, with loss mean + its entry of `spread`."""
  return [record(mean + s, seed=i, **fields) for i, s in enumerate(spread)]


def grid(
  experts: Sequence[int] = (4, 8, 16),
  factors: Sequence[float | None] = (1.0, 2.0, None),
  num_seeds: int = 2,
) -> list[Record]:
  """E x capacity: loss falls by 0.05 per doubling, and as drops cease."""
  steps = tuple(range(1, 21))
  return [
    record(
      loss := 3 - 0.05 * math.log2(e) + (0.0 if c is None else 0.1 / c) + SEED_SHIFT[s],
      seed=s,
      step_ms=20 * (5 if c is None else c) + 2 * math.log2(e),
      curve=Curve(step=steps, loss=tuple(loss + 4 / t for t in steps)),
      values={"dropped_tail": 0.0 if c is None else 0.2 / c / (1 + s / 10)},
      moe__num_experts=e,
      moe__capacity_factor=c,
    )
    for e in experts
    for c in factors
    for s in range(num_seeds)
  ]


def of(runs: Sequence[Record]) -> records.Records:
  return records.with_settings(runs)


def write_run(
  path: pathlib.Path,
  config: Config | None = None,
  *,
  loss: float = 3.0,
  logged: int = 20,
  done: bool = True,
) -> pathlib.Path:
  """The files of a run that logged every step, 1 to `logged`."""
  config = config or make_config()
  path.mkdir(parents=True)
  (path / "config.json").write_text(json.dumps(config_text.to_dict(config)))
  mesh = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
  begun = {"dataset_fingerprint": "abc", "revision": "r1", "mesh": mesh}
  (path / "run.json").write_text(json.dumps(begun))
  lines = [
    {
      "step": step,
      "loss": 5.0 - step / 10,
      "dropped_fraction": step / 100,
      # The first step is slow, and half of the others twice as slow as the rest.
      "tokens_per_second": 1.0 if step == 1 else 4000.0 if step % 2 else 2000.0,
      "skipped_steps": 0,
      "moe": {"max_load_ratio": [1.0, 2.0], "entropy_fraction": [0.5, 0.7]},
    }
    for step in range(1, logged + 1)
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (path / "metrics.jsonl").write_text(text)
  if done:
    (path / "eval.json").write_text(
      json.dumps(evaluation(config.train.num_steps, {"dropless": loss}))
    )
  return path


def evaluation(
  step: int, losses: dict[Any, float], tokens: int = 400, split: str = "validation"
) -> dict[str, Any]:
  """The content of an evaluation's file."""
  results = [
    {
      "eval_capacity_factor": factor,
      "loss": loss,
      "dropped_fraction": 0.25,
      "layers": [{"dead_experts": 1.0}, {"dead_experts": 2.0}],
    }
    for factor, loss in losses.items()
  ]
  return {
    "step": step,
    "split": split,
    "tokens": tokens,
    "split_tokens": tokens,
    "loss": results[0]["loss"],
    "bits_per_byte": results[0]["loss"] / 2,
    "results": results,
  }
