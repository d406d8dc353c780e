"""Evaluate a run's checkpoint: loss, bits per byte, domains, drops, loads.

  python -m experiments.evaluate --workdir=DIR [--step=N] [--split=validation]
    [--eval_capacity_factor=1,1.25,2,dropless] [--routing] [--config.data...]

Needs only the run's directory: the config is the checkpoint's, and --config.data...
overrides it (another text, a longer sequence). A run trained with a capacity is evaluated
with moe.eval_capacity_factor and with the factor of training. Prints tables and writes
DIR/eval_STEP_SPLIT.json; other capacities, a part of the split and an override each
extend that name. DIR/eval.json, the run's own evaluation, is left unchanged; a note is
printed if this evaluation contradicts it (docs/evaluation.md).

If another user trained the run, the paths in its config are not used:
--config.data.path must be given if the run has one, and your own cache is used.

--tasks=FILE_OR_NAME,... runs tasks of EleutherAI's lm-evaluation-harness (extra lm-eval)
instead, and writes DIR/tasks_STEP_NAMES.json; data that is not on this machine is fetched
only with HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0.

Several processes can evaluate together, started as for experiments.train: by
tools.launch_local, by a cluster, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID. Process 0 prints and writes.
"""

import contextlib
import fnmatch
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import flags

from moejax.cli import flags as cli
from moejax.cli import restored
from moejax.errors import UserError
from moejax.run import compilation_cache
from moejax.storage.paths import RunPath, in_bucket

_TRAINING_ONLY = (
  "optimizer.*",
  "train.*",
  "moe.capacity_factor",
  "moe.expert_dropout",
  "moe.jitter",
  "moe.*_weight",
)
"""Fields that evaluation does not read."""

_STEP = flags.DEFINE_integer(
  "step", None, "Which checkpoint; default: the newest.", lower_bound=0
)
_SPLIT = flags.DEFINE_enum(
  "split", "validation", ["train", "validation", "test"], "Split to read."
)
_FACTORS = flags.DEFINE_string(
  "eval_capacity_factor",
  None,
  "Capacity factors to compare, e.g. 1,1.25,2,dropless; default: the config's, then that "
  "of training.",
)
_BATCH = flags.DEFINE_integer(
  "batch_size",
  None,
  "Sequences per step, rounded up to whole routing groups on every device; results do "
  "not depend on it; default: a microbatch of training.",
  lower_bound=1,
  upper_bound=2**31 - 1,
)
_LIMIT = flags.DEFINE_integer(
  "max_batches", 0, "Maximum number of batches; 0 means all.", lower_bound=0
)
_ROUTING = flags.DEFINE_bool(
  "routing",
  False,
  "Also write routing_STEP_SPLIT.json and .png: which experts serve which tokens.",
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Directory for the files; default: the run's."
)
_TASKS = flags.DEFINE_string(
  "tasks",
  None,
  "Instead of a split: tasks of lm-evaluation-harness, names or YAML files, separated by "
  "commas.",
)
_TRUNCATE = flags.DEFINE_bool(
  "truncate",
  False,
  "With --tasks: leave out the first tokens of a text that is too long.",
)
_TASK_LIMIT = flags.DEFINE_integer(
  "task_limit", None, "With --tasks: maximum number of documents per task.", lower_bound=1
)


def main() -> None:
  # jax is imported after the flags are checked.
  from moejax.evaluate import perplexity
  from moejax.launch import distributed

  _refuse_unread(cli.overrides())
  workdir = cli.run_location()
  output = _writable(pathlib.Path(_OUTPUT.value) if _OUTPUT.value else workdir)
  factors = perplexity.parse_capacity_factors(_FACTORS.value) if _FACTORS.value else None
  if _ROUTING.value:
    _local(output, "--routing")
  facts = {f"--{name}": str(value) for name, value in _asked().items()}
  if _TASKS.value:
    from moejax.cli import harness

    # The harness identifies a run by the name of its directory.
    workdir, output = cli.run_directory(), _local(output, "--tasks")

    if cli.overrides():
      raise UserError(
        "--tasks evaluates the run as it was trained: leave out --config flags "
        f"({', '.join(sorted(cli.overrides()))})."
      )
    with distributed.joined(facts=facts):
      harness.evaluate(
        *(workdir, output, _TASKS.value),
        step=_STEP.value,
        batch_size=_BATCH.value or 8,
        truncate=_TRUNCATE.value,
        limit=_TASK_LIMIT.value,
      )
    return
  with distributed.joined(facts=facts):
    evaluate(workdir, output, factors)


def _refuse_unread(overrides: Iterable[str]) -> None:
  for name in overrides:
    if any(fnmatch.fnmatch(name, pattern) for pattern in _TRAINING_ONLY):
      raise UserError(
        f"--config.{name}: only training reads it, so it would change nothing here. "
        "Leave it out (--batch_size and --eval_capacity_factor are separate flags)."
      )


def _asked() -> dict[str, Any]:
  """Returns the settings that must agree in all processes of an evaluation."""
  flag_values = {
    f.name: f.value for f in (_STEP, _SPLIT, _FACTORS, _BATCH, _LIMIT, _TASKS)
  }
  return {"workdir": flags.FLAGS.workdir} | flag_values | cli.overrides()


def evaluate(
  workdir: RunPath, output: RunPath, factors: tuple[float | None, ...] | None
) -> None:
  """Restores, evaluates and reports; called in every process of a job."""
  import jax

  from moejax.evaluate import perplexity

  tells = jax.process_index() == 0

  def check(model: Any, dataset: Any) -> None:
    _check(model, dataset, factors or _own_factors(model))

  run = restored.opened(workdir, _STEP.value, check)
  model, dataset = run.model, run.dataset
  factors = factors or _own_factors(model)
  batch_size = _batch_size(run.config, run.mesh, factors, tells)
  params, meta = run.params()
  what: dict[str, Any] = {
    "model": model,
    "params": params,
    "dataset": dataset,
    "split": _SPLIT.value,
    "mesh": run.mesh,
    "batch_size": batch_size,
    "limit": _LIMIT.value,
  }
  with _watched(what, tells) as progress:
    evaluation = perplexity.evaluate(capacity_factors=factors, progress=progress, **what)
  changes = list(run.changes)
  if not run.is_training_dataset:
    changes.append(("dataset", meta.get("dataset_fingerprint"), dataset.fingerprint))
  evaluation = {
    "step": meta["step"],
    "workdir": str(workdir),
    "dataset_fingerprint": dataset.fingerprint,
    "is_training_dataset": run.is_training_dataset,
    "changed": {field: now for field, _, now in changes},
  } | evaluation
  evaluation |= perplexity.headline(evaluation, run.config.moe.eval_capacity_factor)
  if tells:
    _tell(evaluation, workdir, output, changes, _own_factors(model))
  if _ROUTING.value:
    local = _local(output, "--routing")
    _analyse_routing(what, evaluation, local, changes, tells)


def _check(model: Any, dataset: Any, factors: tuple[float | None, ...]) -> None:
  """Rejects, before reading parameters, an evaluation that would fail later.

  Raises:
    UserError: there is nothing to evaluate, or it cannot be evaluated this way.
  """
  split, router = _SPLIT.value, model.moe.router
  if not dataset.num_tokens(split):
    raise UserError(
      f"--split={split} has no text in this dataset. Choose another split, or raise "
      f"--config.data.{split}_fraction."
    )
  if _ROUTING.value and not model.moe_layers:
    raise UserError("--routing: this model has no MoE layer, so nothing is routed.")
  if _ROUTING.value and model.config.kind == "encoder_decoder":
    raise UserError(
      "--routing: an encoder-decoder routes two texts, and only a decoder's routing can "
      "be shown. Leave it out; the loads of all layers are in the evaluation."
    )
  if model.moe_layers and model.router.needs_capacity and None in factors:
    raise UserError(
      f"--eval_capacity_factor={_FACTORS.value}: experts of router {router} have a fixed "
      "number of slots, so it cannot be evaluated dropless. Give numbers."
    )
  if (
    model.moe_layers
    and model.router.fixed_slots
    and set(factors) != {model.moe.capacity_factor}
  ):
    raise UserError(
      f"--eval_capacity_factor={_FACTORS.value}: the slots of router {router} are "
      f"learned. Give {model.moe.capacity_factor}, as trained."
    )


def _own_factors(model: Any) -> tuple[float | None, ...]:
  """Returns the default capacity factors of an evaluation."""
  from moejax.evaluate import perplexity

  return perplexity.own_factors(model.moe, bool(model.moe_layers))


def _batch_size(config: Any, mesh: Any, factors: Any, tells: bool) -> int:
  """Returns the batch size; prints a note if it differs from the one requested."""
  from moejax.evaluate import groups

  wanted = _BATCH.value or 0
  size = groups.batch_size(config, mesh, factors, wanted)
  if tells and wanted and size != wanted:
    print(
      f"Note: --batch_size={wanted} is raised to {size}, so that each of {mesh.size} "
      f"device(s) has whole routing groups of {groups.group_tokens(config)} tokens."
    )
  return size


@contextlib.contextmanager
def _watched(what: dict[str, Any], tells: bool) -> Iterator[Callable[[int], None]]:
  """Shows a progress bar of evaluated tokens, on stderr, away from the tables."""
  from moejax.config.spans import target_length
  from moejax.run.progress import make_reporter, watched

  dataset, split = what["dataset"], what["split"]
  length = target_length(dataset.config)
  total = dataset.num_tokens(split)
  covered = what["limit"] * what["batch_size"] * length or total
  reporter = make_reporter(0, process_index=0 if tells else 1, stream=sys.stderr)
  try:
    with watched(reporter, f"{split}, tokens", min(covered, total)) as progress:
      yield progress
  finally:
    reporter.close()


def _tell(
  evaluation: dict[str, Any],
  workdir: RunPath,
  output: RunPath,
  changes: list[tuple[str, Any, Any]],
  own_factors: tuple[float | None, ...],
) -> None:
  """Prints the tables, writes the file and notes if the run's eval.json disagrees."""
  from moejax.evaluate import perplexity, tables
  from moejax.run import results

  console = tables.make_console()
  tables.print_evaluation(console, evaluation)
  if not evaluation["is_training_dataset"]:
    console.print("Note: this is not the text the run was trained on.")
  if not changes:
    own = results.read(workdir / results.EVAL_FILE)
    if note := results.disagreement(own, evaluation):
      print(note)
  names = [perplexity.spelled(factor) for factor in own_factors]
  file = output / f"{results.name('eval', evaluation, changes, names)}.json"
  results.write(file, evaluation)
  print(file)


def _analyse_routing(
  what: dict[str, Any],
  evaluation: dict[str, Any],
  output: pathlib.Path,
  changes: list[tuple[str, Any, Any]],
  tells: bool,
) -> None:
  from moejax.analysis import routing as routing_analysis
  from moejax.run import results

  analysis = routing_analysis.analyse(**what)
  if not tells:
    return
  # The analysis does not depend on capacity factors.
  named = {name: value for name, value in evaluation.items() if name != "results"}
  stem = results.name("routing", named, changes)
  file, picture = output / f"{stem}.json", output / f"{stem}.png"
  results.write(file, {"step": evaluation["step"]} | analysis)
  routing_analysis.draw(analysis, picture)
  print(file)
  print(picture)


def _local(output: RunPath, flag: str) -> pathlib.Path:
  """Returns a local directory; refuses a bucket for the output of a flag."""
  if not isinstance(output, pathlib.Path):
    raise UserError(
      f"{flag}: its files cannot be written to {output}. Give --output=DIR."
    )
  return output


def _writable(directory: RunPath) -> RunPath:
  """Rejects a directory that is not writable, before the evaluation starts."""
  if in_bucket(directory):
    # The run itself wrote there; a bucket shows no more before the file is written.
    return directory
  if not directory.is_dir() or not os.access(directory, os.W_OK):
    raise UserError(
      f"{directory} is not a writable directory. Give another with --output=DIR."
    )
  return directory


def run() -> None:
  """Runs the program."""
  cli.define_config(default=None)
  compilation_cache.define_flag()
  cli.run(main, buckets=("workdir",))


if __name__ == "__main__":
  run()
