"""Evaluation files in a run's directory, and descriptions of what they covered.

  eval.json              the run's own, written by the run after its last step
  eval_STEP_SPLIT.json   from `moejax.cli.evaluate` with the run's settings; with others,
                         the name shows what differs, so that none replaces another
  step_time.json         the time of some steps by part, from a trace of the run

Files are written atomically, and only `train.finish` writes eval.json.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from moejax import files
from moejax.run import writers
from moejax.storage.paths import RunPath

EVAL_FILE = "eval.json"
STEP_TIME_FILE = "step_time.json"

_SAME_LOSS = 1e-4
"""Relative tolerance: another mesh sums in another order, and may break ties between
experts."""


def write(path: RunPath, values: dict[str, Any]) -> None:
  """Replaces a JSON file atomically; NaN and infinities become null."""
  text = json.dumps(writers.finite(values), indent=2, ensure_ascii=False)
  files.write_text(path, text + "\n")


def read(path: RunPath) -> dict[str, Any]:
  """Returns the content of an evaluation's file; empty if missing or unreadable."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def name(
  prefix: str,
  evaluation: dict[str, Any],
  changes: Sequence[tuple[str, Any, Any]],
  own_factors: Sequence[float | str] = (),
) -> str:
  """Returns a file's name without its suffix; names are equal only for equal settings.

  Args:
    prefix: eval or routing.
    evaluation: has step, split, tokens, split_tokens and, if any, `results`.
    changes: fields that differ from the run's: (name, the run's value, this one).
    own_factors: the capacity factors of the run, which an evaluation uses by default.
  """
  parts = [prefix, str(evaluation["step"]), evaluation["split"]]
  factors = [result["eval_capacity_factor"] for result in evaluation.get("results", [])]
  if factors != list(own_factors) and factors:
    parts += ["capacity", *(_factor(factor) for factor in factors)]
  if evaluation["tokens"] < evaluation["split_tokens"]:
    parts += ["first", str(evaluation["tokens"])]
  if changes:
    text = json.dumps(sorted((field, repr(now)) for field, _, now in changes))
    parts.append(hashlib.sha256(text.encode()).hexdigest()[:8])
  return "_".join(parts)


def _factor(factor: float | str) -> str:
  return factor if isinstance(factor, str) else f"{factor:g}"


def coverage(
  tokens: int, split_tokens: int | None, show: Callable[[float], str] = "{:,}".format
) -> str:
  """Returns the tokens a loss covers: `all 10 tokens`, or `first 5 of 10 tokens`.

  Args:
    tokens: number evaluated.
    split_tokens: number in the whole split, if known.
    show: formats a number.
  """
  if not split_tokens:  # A file from an earlier version.
    return f"{show(tokens)} tokens"
  if tokens >= split_tokens:
    return f"all {show(tokens)} tokens"
  return f"first {show(tokens)} of {show(split_tokens)} tokens"


def disagreement(own: dict[str, Any], evaluation: dict[str, Any]) -> str:
  """Returns a line if an evaluation of the same text contradicts the run's; else "".

  Args:
    own: content of eval.json; empty if there is none.
    evaluation: made with the run's settings, except for the capacity factors.
  """
  same = ("step", "split", "tokens", "bytes")
  if not own or any(own.get(key) != evaluation[key] for key in same):
    return ""
  mine = {r["eval_capacity_factor"]: r["loss"] for r in evaluation["results"]}
  for result in own.get("results", []):
    factor, theirs = result["eval_capacity_factor"], result["loss"]
    loss = mine.get(factor)
    if loss is not None and abs(loss - theirs) > _SAME_LOSS * abs(theirs):
      return (
        f"Note: {EVAL_FILE} has {theirs:.4f} nats/token for the same step, text and "
        f"capacity ({_factor(factor)}), and this evaluation gives {loss:.4f}. "
        f"{EVAL_FILE} stays as the run wrote it."
      )
  return ""
