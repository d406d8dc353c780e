"""The data in one run's directory: values by column, evaluations, and its curve.

Reads config.json, metrics.jsonl, eval*.json, run.json, and .sweep.json of a sweep's
scheduler. Nothing is guessed: missing values are absent. A damaged file is an error that
names it, except for a last log line that a crash tore.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moejax import files
from moejax.config import Config
from moejax.cost import flops, parameters
from moejax.data import tokenizer as tokenizer_lib
from moejax.errors import UserError
from moejax.run import results, writers
from moejax.run import workdir as workdir_lib
from moejax.sweep.report.columns import TAIL

DONE, UNFINISHED = "done", "unfinished"

_SCHEDULER_FILE = ".sweep.json"
_WARM_UP = 1
"""Number of first logged step times to drop: caches and clocks are still warming up."""

_REMEDY_EVAL = (
  "Delete it; the run's own command, or `evaluate`, then evaluates and writes it again."
)
_REMEDY_RUN = "Restore it from a backup; or delete it, which loses only the provenance."
_REMEDY_LOG = "Restore it from a backup, or delete that line."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
  """Values that a run logged during training; steps increase."""

  step: tuple[int, ...] = ()
  loss: tuple[float, ...] = ()
  """Loss of the training batch, nats per token; NaN where it was not finite."""
  eval_step: tuple[int, ...] = ()
  """Steps of the evaluations during training."""
  eval_loss: tuple[float, ...] = ()
  """Held-out loss on `train.eval_batches`, nats per token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunValues:
  """The data found in one directory."""

  values: dict[str, Any]
  """By column; absent if unknown."""
  evaluations: dict[str, tuple[float, float | None]]
  """`validation@1.25` and the like to loss (nats per token) and dropped fraction."""
  curve: Curve


def read(path: pathlib.Path, config: Config, timing: Mapping[str, Any]) -> RunValues:
  """Reads a run's directory.

  Args:
    path: of the directory.
    config: the run's.
    timing: see `records.read`; empty if there is none.

  Raises:
    UserError: a file is damaged.
  """
  lines = _lines(path / writers.METRICS_FILE)
  final = _json(path / results.EVAL_FILE, _REMEDY_EVAL)
  begun = _json(path / workdir_lib.RUN_FILE, _REMEDY_RUN)
  total = config.train.num_steps
  done = final.get("step") == total
  steps = total if done else max((line["step"] for line in lines), default=0)
  values: dict[str, Any] = {
    "run": path.name,
    "state": DONE if done else UNFINISHED,
    "seed": config.train.seed,
    "steps": steps,
    "num_steps": total,
    "dataset": begun.get("dataset_fingerprint"),
    "revision": begun.get("revision"),
  }
  values |= _cost(config, path, steps)
  if done:
    values |= _final(final, path / results.EVAL_FILE)
  values |= _training(lines, total)
  values |= _devices(begun)
  values |= _speed(lines, config, _timed(timing, path.name))
  values["wall_seconds"] = _wall_seconds(path)
  return RunValues(
    values={name: value for name, value in values.items() if value is not None},
    evaluations=_evaluations(path, steps, final) if done else {},
    curve=_curve(lines),
  )


def _json(path: pathlib.Path, remedy: str) -> dict[str, Any]:
  """Returns the object in a file; empty if there is none.

  Raises:
    UserError: the file is damaged.
  """
  try:
    found = files.read_json(path)
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as e:
    words = " ".join(str(e).split())
    raise UserError(f"{path} cannot be read ({words}). {remedy}") from e
  if not isinstance(found, dict):
    raise UserError(
      f"{path} cannot be read (it does not contain a JSON object). {remedy}"
    )
  return found


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the logged steps; a torn last line, which a crash leaves, is left out.

  Raises:
    UserError: another line is damaged.
  """
  if not path.exists():
    return []
  text = path.read_text(encoding="utf-8", errors="replace").splitlines()
  found = []
  for number, line in enumerate(text, start=1):
    try:
      entry = files.parse_json(line)
      if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        raise ValueError("it has no step")
    except ValueError as e:
      if number == len(text):
        break
      raise UserError(f"{path}:{number} cannot be read ({e}). {_REMEDY_LOG}") from e
    found.append(entry)
  return found


def _cost(config: Config, path: pathlib.Path, steps: int) -> dict[str, Any]:
  vocab_size = _vocab_size(config, path)
  total, active = parameters.count_parameters(config, vocab_size)
  training = flops.flops_per_token(config, vocab_size)
  tokens = steps * flops.tokens_per_step(config)
  return {
    "parameters": total["total"],
    "active_parameters": active["total"],
    "flops_per_token": training["total"],
    "router_flops_per_token": training["router"],
    "expert_flops_per_token": training["experts"] + training["shared_experts"],
    "tokens": tokens,
    "training_flops": training["total"] * tokens,
  }


def _vocab_size(config: Config, path: pathlib.Path) -> int:
  # A tokenizer trained on little text may be smaller than data.vocab_size.
  if not config.model.vocab_size and (path / tokenizer_lib.FILE).exists():
    return tokenizer_lib.load_tokenizer(path).vocab_size
  return parameters.resolve_vocab_size(config)


def _number(found: Mapping[str, Any], name: str, path: pathlib.Path) -> Any:
  """Returns a number, or None if it is missing or was not finite.

  Raises:
    UserError: it is something else.
  """
  value = found.get(name)
  if value is None or type(value) in (int, float):
    return value
  remedy = _REMEDY_EVAL
  raise UserError(f"{path} is damaged: {name} is {value!r}, not a number. {remedy}")


def _final(final: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
  found = {name: _number(final, name, path) for name in ("loss", "bits_per_byte")}
  found["eval_tokens"] = _number(final, "tokens", path)
  layers = [
    layer for result in final.get("results", [])[:1] for layer in result.get("layers", [])
  ]
  if layers:
    found["dead_experts"] = sum(int(layer["dead_experts"]) for layer in layers)
  return found


def _evaluations(
  path: pathlib.Path, steps: int, own: Mapping[str, Any]
) -> dict[str, tuple[float, float | None]]:
  """Returns losses and drops of the last step by split and factor.

  These are the run's own evaluation, and those of the same text, either in full or as far
  as the run's own. Of two with the same name, the one with more tokens counts.
  """
  best: dict[str, tuple[Any, Any, Any]] = {}
  for file in sorted(path.glob("eval*.json")):
    found = _json(file, _REMEDY_EVAL)
    if found.get("step") != steps or found.get("changed"):
      continue
    tokens = _number(found, "tokens", file) or 0
    if tokens not in (found.get("split_tokens"), own.get("tokens")):
      continue
    for result in found.get("results", []):
      loss = _number(result, "loss", file)
      factor = result.get("eval_capacity_factor")
      factor = factor if isinstance(factor, str) else f"{factor:g}"
      name = f"{found['split']}@{factor}"
      before = best.get(name, (-1, 0.0, None))[0]
      if loss is not None and tokens > before:
        best[name] = tokens, loss, _number(result, "dropped_fraction", file)
  return {name: (loss, dropped) for name, (_, loss, dropped) in sorted(best.items())}


def _finite(lines: Iterable[Mapping[str, Any]], read: Callable[..., Any]) -> list[float]:
  values = (read(line) for line in lines)
  return [v for v in values if isinstance(v, int | float) and math.isfinite(v)]


def _mean(values: Sequence[float]) -> float | None:
  return float(np.mean(values)) if values else None


def _dropped(line: Mapping[str, Any]) -> Any:
  return line.get("dropped_fraction")


def _training(lines: Sequence[Mapping[str, Any]], total: int) -> dict[str, Any]:
  """Returns loss, drops and balance from the log."""
  lines = [line for line in lines if "loss" in line]
  if not lines:
    return {}
  tail = lines[-max(1, round(TAIL * len(lines))) :]

  def of_layers(name: str, reduce: Callable[..., float]) -> float | None:
    layers = [line["moe"] for line in tail if line.get("moe", {}).get(name)]
    return _mean([float(reduce(layer[name])) for layer in layers])

  return {
    "train_loss": _mean(_finite(tail, lambda line: line["loss"])),
    "dropped": _mean(_finite(lines, _dropped)),
    "dropped_tail": _mean(_finite(tail, _dropped)),
    "tail_begin": tail[0]["step"] / total,
    "tail_end": tail[-1]["step"] / total,
    "max_load": of_layers("max_load_ratio", np.max),
    "router_entropy": of_layers("entropy_fraction", np.mean),
    "skipped_steps": lines[-1].get("skipped_steps"),
  }


def _curve(lines: Sequence[Mapping[str, Any]]) -> Curve:
  kept = [line for line in lines if "loss" in line]
  losses = [math.nan if line["loss"] is None else float(line["loss"]) for line in kept]
  evals = [
    (line["step"], float(line["validation_loss"]))
    for line in lines
    if isinstance(line.get("validation_loss"), int | float)
  ]
  return Curve(
    step=tuple(line["step"] for line in kept),
    loss=tuple(losses),
    eval_step=tuple(step for step, _ in evals),
    eval_loss=tuple(loss for _, loss in evals),
  )


def _devices(begun: Mapping[str, Any]) -> dict[str, Any]:
  mesh = begun.get("mesh")
  if not mesh:
    return {}
  found: dict[str, Any] = {"devices": math.prod(mesh.values())}
  if mesh.get("expert") == 1:
    found["all_to_all_bytes"] = 0
  return found


def _timed(timing: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
  """Returns the entry of timing.json that covers a run."""
  for entry in timing.values():
    if isinstance(entry, Mapping) and name in entry.get("runs", ()):
      return entry
  return None


def _speed(
  lines: Sequence[Mapping[str, Any]],
  config: Config,
  timed: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Returns step times, from timing.json if the run is in it, else from its log."""
  per_step = flops.tokens_per_step(config)
  if timed and timed.get("step_ms"):
    times, source = list(timed["step_ms"]), "timed"
  else:
    # A logged rate covers all steps since the last logged one.
    rates = _finite(lines, lambda line: line.get("tokens_per_second"))
    rates = rates[_WARM_UP:] or rates
    times, source = [1000 * per_step / rate for rate in rates if rate > 0], "logged"
  if not times:
    return {}
  median = float(np.median(times))
  found: dict[str, Any] = {
    "step_ms_p50": median,
    "step_ms_p90": float(np.quantile(times, 0.9)),
    "tokens_per_second": 1000 * per_step / median,
    "step_time_source": source,
  }
  logged = [line for line in lines if line.get("utilisation")]
  if logged:
    line = logged[-1]
    peak_share = line["utilisation"] / line["tokens_per_second"]
    found["utilisation"] = peak_share * found["tokens_per_second"]
  names = ("peak_memory_bytes", "all_to_all_bytes", "compile_seconds")
  return found | {n: timed[n] for n in names if timed and timed.get(n) is not None}


def _wall_seconds(path: pathlib.Path) -> float | None:
  """Returns the seconds of all recorded attempts; None if any cannot be known."""
  attempts = _json(path / _SCHEDULER_FILE, "Delete it.").get("attempts")
  if not isinstance(attempts, list) or not attempts:
    return None
  spans = [
    attempt["end"] - attempt["start"]
    for attempt in attempts
    if isinstance(attempt, dict)
    and all(isinstance(attempt.get(k), int | float) for k in ("start", "end"))
  ]
  # Negative if the clock was set back meanwhile.
  known = len(spans) == len(attempts) and min(spans) >= 0
  return float(sum(spans)) if known else None
