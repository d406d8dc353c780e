"""Checks --init_from before a new run writes anything, with its own error messages."""

import fnmatch
from typing import Any

import jax

from moejax.checkpoint.read import DamagedCheckpointError, mismatches, read_meta
from moejax.config import Config
from moejax.config import text as config_text
from moejax.cost.parameters import resolve_vocab_size
from moejax.data import tokenizer
from moejax.data.sentinels import with_sentinels
from moejax.errors import ConfigError, UserError, program
from moejax.models.make import make_model
from moejax.run.files import CONFIG_FILE, DIRECTORY, list_steps
from moejax.storage.paths import run_path

_SHAPES = (
  *("model.*", "moe.*", "data.tokenizer", "data.vocab_size"),
  *("data.objective", "data.num_sentinels"),
)

_HOW_MANY = (
  "moe.num_experts",
  "moe.segments",
  "moe.num_shared",
  "moe.every",
  "moe.offset",
  "moe.dense_prefix",
  "moe.dense_twin",
)
"""Fields that add or remove experts."""


def check(source: str, config: Config) -> None:
  """Rejects parameters that do not fit the model of a new run.

  Reads only the meta of the newest readable checkpoint, no arrays.

  Args:
    source: --init_from.
    config: of the new run, validated.

  Raises:
    UserError: there is no checkpoint.
    ConfigError: the parameters belong to another model; names the fields that differ.
  """
  meta = _newest_meta(source)
  old = config_text.from_dict(meta["config"])
  vocab_size = _vocab_size(source, config)
  try:
    model = make_model(config.model, config.moe, vocab_size=vocab_size)
    problems = mismatches(meta["leaves"], {"params": model.shapes()})
    problems = [p for p in problems if p.startswith("params.")]
  except ConfigError as error:
    raise ConfigError(f"--init_from={source}: {error}") from error
  if problems:
    raise ConfigError(f"--init_from={source} {_explain(old, config, problems)}")


def _newest_meta(source: str) -> dict[str, Any]:
  root = run_path(source, "--init_from")
  if not root.is_dir():
    what = "is a file" if root.exists() else "does not exist"
    raise UserError(
      f"--init_from={source} {what}. Give the --workdir of a run that saved a checkpoint."
    )
  directory = root / DIRECTORY if list_steps(root / DIRECTORY) else root
  steps = list_steps(directory)
  if not steps:
    names = sorted(p.name for p in root.iterdir())
    held = f"it holds {', '.join(names[:5])}" if names else "it is empty"
    raise UserError(
      f"--init_from={source} has no checkpoint: {held}. Give the --workdir of a run that "
      "saved one."
    )
  reasons = []
  for step in reversed(steps):
    try:
      return read_meta(directory / str(step))
    except DamagedCheckpointError as error:
      reasons.append(f"step {step}: {error}")
  raise UserError(
    f"--init_from={source} has no intact checkpoint. {'. '.join(reasons)}. Give "
    "another run."
  )


def _vocab_size(source: str, config: Config) -> int:
  """Returns V of the new run, which reuses the source's tokenizer."""
  if not (run_path(source) / CONFIG_FILE).exists():
    return resolve_vocab_size(config)
  try:
    stored = tokenizer.load_tokenizer(source)
  except UserError as error:
    raise UserError(
      f"--init_from={source} holds no readable tokenizer, and its parameters fit no "
      "other. Give another run."
    ) from error
  asked = (config.data.tokenizer, config.data.vocab_size)
  if asked[0] != stored.kind or (stored.kind == "bpe" and asked[1] != stored.vocab_size):
    size = f" --config.data.vocab_size={stored.vocab_size}"
    raise ConfigError(
      f"--init_from={source} has a tokenizer {stored.kind} of {stored.vocab_size} ids, "
      "which its parameters need: give --config.data.tokenizer="
      f"{stored.kind}{'' if stored.kind == 'hf' else size}."
    )
  return with_sentinels(stored, config.data).vocab_size


def _explain(old: Config, new: Config, problems: list[str]) -> str:
  changed = [
    (name, before, now)
    for name, before, now in config_text.difference(old, new)
    if any(fnmatch.fnmatch(name, pattern) for pattern in _SHAPES)
    and _matters(new, name, before, now)
  ]
  if not changed:
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return f"holds another model: {'; '.join(problems[:3])}{more}."
  fields = "; ".join(
    f"--config.{name} was {before} there and is {now} here"
    for name, before, now in changed
  )
  experts = ""
  if any(name in _HOW_MANY for name, _, _ in changed):
    made = program("surgery", "tools.surgery")
    experts = f" {made} adds experts to a run or removes them."
  return (
    f"holds parameters of other shapes: {fields}.{experts} Give the same values, or "
    "leave --init_from out."
  )


def _matters(new: Config, name: str, before: Any, now: Any) -> bool:
  """Returns whether this field alone changes the shapes of the parameters."""
  one = config_text.from_dict(config_text.to_dict(new))
  config_text.set_field(one, name, before)
  return _shapes(one) != _shapes(new)


def _shapes(config: Config) -> Any:
  try:
    model = make_model(config.model, config.moe, vocab_size=resolve_vocab_size(config))
    shapes = model.shapes()
  except (ValueError, ConfigError, ZeroDivisionError):
    return None  # Not a model: other fields would have to change with it.
  return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), shapes)
