"""The columns of results.csv: name, unit and meaning, in order.

In the file, the fields in which the runs differ come first, under their dotted names.
These columns follow, and then one pair per evaluation at another capacity factor
(`evaluation_columns`). The docs print this table, so that the two cannot differ.
"""

import dataclasses
from collections.abc import Iterable, Sequence

TAIL = 0.1
"""Fraction of a run's logged steps that is its tail."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
  """One column of results.csv."""

  name: str
  unit: str
  """Unit; empty for words and plain counts."""
  meaning: str


def _table(*rows: tuple[str, str, str]) -> tuple[Column, ...]:
  return tuple(Column(name=n, unit=u, meaning=m) for n, u, m in rows)


COLUMNS = _table(
  ("run", "", "name of the run's directory"),
  ("state", "", "done, unfinished, or the state that --status shows"),
  ("seed", "", "train.seed"),
  ("steps", "", "optimizer steps taken: those logged, or all if done"),
  ("num_steps", "", "optimizer steps requested"),
  ("parameters", "", "N_total: all parameters, embedding included"),
  ("active_parameters", "", "N_active: those a token uses, embedding included"),
  (
    "flops_per_token",
    "FLOP",
    "training FLOPs per token, 3 x forward (moejax/cost/flops.py)",
  ),
  ("router_flops_per_token", "FLOP", "the routers' part of it"),
  ("expert_flops_per_token", "FLOP", "the routed and shared experts' part of it"),
  ("tokens", "", "training tokens: steps x batch size x sequence length"),
  ("training_flops", "FLOP", "C: flops_per_token x tokens"),
  ("loss", "nats/token", "held-out cross-entropy of the run's own final evaluation"),
  ("bits_per_byte", "bits/byte", "the same per byte of text"),
  ("eval_tokens", "", "tokens of that evaluation; losses compare only if these agree"),
  ("train_loss", "nats/token", f"training loss, mean over the tail ({TAIL:.0%})"),
  ("dropped", "fraction", "assignments not computed in training, mean of logged steps"),
  ("dropped_tail", "fraction", "the same over the tail alone"),
  ("tail_begin", "fraction", "where the tail begins, as a fraction of num_steps"),
  ("tail_end", "fraction", "where the tail ends; 1 if the run is done"),
  ("max_load", "x mean", "load of the fullest expert of any layer, mean over the tail"),
  ("router_entropy", "of log E", "entropy of the router's choice, mean over the tail"),
  ("dead_experts", "", "experts that computed nothing in the final evaluation"),
  ("step_ms_p50", "ms", "time of a training step, median"),
  ("step_ms_p90", "ms", "the same, 90th percentile"),
  ("tokens_per_second", "1/s", "tokens of a step / step_ms_p50"),
  ("step_time_source", "", "timed: alone, after the sweep; logged: while training"),
  ("utilisation", "fraction", "of the chip's bfloat16 peak, where that is known"),
  ("peak_memory_bytes", "B", "of the compiled step, per device, where it was timed"),
  ("all_to_all_bytes", "B", "sent per step between experts' devices, where known"),
  ("compile_seconds", "s", "compiling the train step, where it was timed"),
  ("wall_seconds", "s", "all attempts, start to end, where a scheduler recorded them"),
  ("skipped_steps", "", "steps skipped because a gradient was not finite"),
  ("devices", "", "devices of the run's mesh"),
  ("dataset", "", "fingerprint of the tokenized text"),
  ("revision", "", "git commit of the code at the run's first start"),
)


def evaluation_columns(name: str) -> tuple[Column, Column]:
  """Returns the columns of one evaluation at a capacity factor.

  Args:
    name: split and factor, such as `validation@1.25` or `test@dropless`.
  """
  split, _, factor = name.partition("@")
  return (
    Column(
      name=f"loss_{name}",
      unit="nats/token",
      meaning=f"loss of the {split} split, evaluated at capacity factor {factor}",
    ),
    Column(
      name=f"dropped_{name}",
      unit="fraction",
      meaning="assignments not computed in that evaluation",
    ),
  )


def markdown(columns: Iterable[Column] = COLUMNS) -> str:
  """Returns the columns as a Markdown table."""
  rows = [f"| `{c.name}` | {c.unit} | {c.meaning} |" for c in columns]
  return "\n".join(["| Column | Unit | Meaning |", "| --- | --- | --- |", *rows]) + "\n"


def units(columns: Sequence[Column] = COLUMNS) -> dict[str, str]:
  """Returns each column's unit by name."""
  return {column.name: column.unit for column in columns}
