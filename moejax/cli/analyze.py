"""Analyze what a run's routers do: loads, pairs, flow, preferences, drops, what-if.

  python -m experiments.analyze --workdir=DIR [--split=validation] [--text=FILE]
    [--steps=all|100,200] [--out=DIR] [--max_batches=N]
    [--replay --capacity_factor=0.5,1,2 --overflow=drop,next_best --confirm=2]
    [--knockout[=LAYER,...] --knockout_tokens=next_best|none --knockout_pairs=N]
    [--trace=FILE --trace_what=choices|logits] [--from_trace=FILE] [--explore_tokens=N]

Writes analysis.json, figures/ and index.html (open it in a browser; it needs no network)
to --out, by default DIR/analysis. docs/analysis.md says what each measure means and when
it misleads. Several processes can analyze together, started as for experiments.train.
"""

import dataclasses
import pathlib
from typing import Any

from absl import flags

from moejax.cli import arguments, restored
from moejax.cli import flags as cli
from moejax.cli.restored import Asked
from moejax.config import text as config_text
from moejax.errors import ConfigError, UserError
from moejax.run import compilation_cache
from moejax.storage.paths import RunPath

_LISTS = {
  "capacity_factor": "Capacity factors, e.g. 0.5,1,1.25,none.",
  "overflow": "drop,next_best.",
  "priority": "arrival,gate.",
  "slot_order": "choice_major,token_major,by_gate,batch_priority.",
  "group_size": "Tokens per routing group; 0 means one sequence.",
  "num_selected": "Choices per token.",
  "renormalize": "none,before_drop,after_drop.",
}
"""Flags of a replay: fields of `config.moe`, each a list of values."""


class _Layers(flags.ArgumentParser):
  """Parses `--knockout` (all MoE layers), or `--knockout=1,3`."""

  syntactic_help = "layers"

  def parse(self, argument: Any) -> Any:
    if argument in (None, False, "false"):
      return None
    if argument in (True, "true"):
      return ()
    try:
      return tuple(sorted({int(word) for word in argument.split(",")}))
    except (ValueError, AttributeError):
      raise ValueError("give numbers of layers, separated by commas") from None

  def flag_type(self) -> str:
    return "layers"


class _KnockoutFlag(flags.Flag):
  def __init__(self) -> None:
    super().__init__(
      parser=_Layers(),
      serializer=None,
      name="knockout",
      default=None,
      help_string="Remove each expert in turn, in all MoE layers or in these.",
      boolean=True,
    )


_STEPS = flags.DEFINE_string(
  "steps",
  None,
  "Checkpoints: all, or numbers; the last one is analyzed, the others are compared with "
  "it. Default: the newest.",
)
_SPLIT = flags.DEFINE_enum(
  "split", "validation", ["train", "validation", "test"], "Split to read."
)
_TEXT = flags.DEFINE_string(
  "text", None, "A file or folder of text to read instead of the run's dataset."
)
_OUT = flags.DEFINE_string(
  "out", None, "Directory of the results; default: DIR/analysis."
)
_BATCH = flags.DEFINE_integer(
  "batch_size",
  None,
  "Sequences per step, rounded up to whole routing groups; results do not depend on it.",
  lower_bound=1,
  upper_bound=2**31 - 1,
)
_LIMIT = flags.DEFINE_integer(
  "max_batches", 0, "Maximum number of batches; 0 means all.", lower_bound=0
)
_REPLAY = flags.DEFINE_bool(
  "replay", False, "Decide all combinations of the following options from the logits:"
)
_VALUES = {
  name: flags.DEFINE_string(name, None, f"--replay: {about}")
  for name, about in _LISTS.items()
}
_CONFIRM = flags.DEFINE_integer(
  "confirm", 0, "--replay: evaluate the first N combinations too.", lower_bound=0
)
_KNOCKOUT = flags.DEFINE_flag(_KnockoutFlag())
_TOKENS = flags.DEFINE_enum(
  "knockout_tokens",
  "next_best",
  ["next_best", "none"],
  "--knockout: a removed expert's tokens go to their next best, or to none.",
)
_PAIRS = flags.DEFINE_integer(
  "knockout_pairs",
  0,
  "--knockout: also remove the N pairs of each layer that cost most alone.",
  lower_bound=0,
)
_TRACE = flags.DEFINE_string(
  "trace", None, "Write every token's choices to this Parquet file."
)
_WHAT = flags.DEFINE_enum(
  "trace_what", "choices", ["choices", "logits"], "--trace: choices, or logits as well."
)
_FROM = flags.DEFINE_string(
  "from_trace", None, "--replay: read this trace; the model is not run."
)

_EXPLORE = flags.DEFINE_integer(
  "explore_tokens",
  restored.EXPLORE_TOKENS,
  "Number of tokens that the page shows with all their choices; 0 omits the text.",
  lower_bound=0,
  upper_bound=1_000_000,
)


def main() -> None:
  # jax is imported after the flags are checked.
  from moejax.launch import distributed

  workdir = cli.run_location()
  asked = _asked(workdir)
  facts = {f"--{name}": str(value) for name, value in _facts(asked).items()}
  with distributed.joined(facts=facts):
    from moejax.cli import analysis_passes

    request = restored.Request(
      workdir=workdir,
      steps=asked.steps,
      split=_SPLIT.value,
      text=_TEXT.value,
      batch_size=_BATCH.value or 0,
    )
    analysis_passes.analyze(request, asked)


def _facts(asked: Asked) -> dict[str, Any]:
  """Returns the settings that must agree in all processes."""
  given = {f.name: f.value for f in (_SPLIT, _TEXT, _BATCH)}
  return dataclasses.asdict(asked) | given | cli.overrides()


def _asked(workdir: RunPath) -> Asked:
  """Returns the requested passes.

  Raises:
    UserError: flags that contradict each other, or an invalid value.
  """
  if _TEXT.value and flags.FLAGS["split"].present:
    raise UserError("--split: --text has no splits. Leave one out.")
  _refuse_alone(_REPLAY.value, "--replay", [*_LISTS, "confirm", "from_trace"])
  knockout = _KNOCKOUT.value is not None
  _refuse_alone(knockout, "--knockout", ["knockout_tokens", "knockout_pairs"])
  _refuse_alone(bool(_TRACE.value), "--trace=FILE", ["trace_what"])
  if _FROM.value and flags.FLAGS["explore_tokens"].present:
    raise UserError("--explore_tokens: --from_trace writes no page. Leave one out.")
  if _FROM.value and (_TRACE.value or knockout or _STEPS.value or _CONFIRM.value):
    raise UserError(
      "--from_trace runs no model, and --trace, --knockout, --steps and --confirm need "
      "one. Leave them out."
    )
  out = pathlib.Path(_OUT.value) if _OUT.value else workdir / restored.ANALYSIS
  if not isinstance(out, pathlib.Path):
    raise UserError(
      f"--workdir={workdir}: results cannot be written to a bucket. Give --out=DIR."
    )
  return Asked(
    out=arguments.writable(out),
    steps=_STEPS.value,
    limit=_LIMIT.value,
    replay=_values() if _REPLAY.value else None,
    confirm=_CONFIRM.value,
    knockout=_KNOCKOUT.value,
    knockout_tokens=_TOKENS.value,
    knockout_pairs=_PAIRS.value,
    trace=pathlib.Path(_TRACE.value) if _TRACE.value else None,
    trace_what=_WHAT.value,
    from_trace=pathlib.Path(_FROM.value) if _FROM.value else None,
    explore_tokens=_EXPLORE.value,
  )


def _refuse_alone(given: bool, needed: str, names: list[str]) -> None:
  for name in names:
    if flags.FLAGS[name].present and not given:
      raise UserError(f"--{name} does nothing without {needed}. Add it.")


def _values() -> dict[str, list[Any]]:
  """Returns the values of each given option, in order and without duplicates."""
  found = {}
  for name, flag in _VALUES.items():
    if flag.value is None:
      continue
    words = [word.strip() for word in flag.value.split(",")]
    words = ["none" if word == "dropless" else word for word in words]
    found[name] = [_value(name, word) for word in dict.fromkeys(words)]
  if not found:
    raise UserError(
      "--replay: no option is given. Give values, such as --capacity_factor=0.5,1,2."
    )
  return found


def _value(name: str, word: str) -> Any:
  """Parses the value of a field of `config.moe`, given the name of its flag here."""
  field = f"moe.{name}"
  try:
    return config_text.parse_value(field, word)
  except ConfigError:
    raise UserError(f"--{name}={word}: {config_text.expected(field)}.") from None


def run() -> None:
  """Runs the program."""
  cli.define_config(default=None)
  compilation_cache.define_flag()
  cli.run(main, buckets=("workdir",))


if __name__ == "__main__":
  run()
