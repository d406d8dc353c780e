"""Evaluate a run's checkpoint: loss, bits per byte, domains, drops, loads.

  python -m experiments.evaluate --workdir=DIR [--step=N] [--split=validation]
    [--eval_capacity_factor=1,1.25,2,dropless] [--routing] [--config.data...]

Needs nothing but the run's directory: the config is the checkpoint's, and
--config.data... is laid over it (another text, a longer sequence). Prints tables and
writes DIR/eval_STEP_SPLIT.json; an evaluation of the run as it is, on its whole
validation split, also renews DIR/eval.json.

Several processes evaluate together, started as those of experiments.train are: by
tools.launch_local, by a cluster, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID. The first one prints and writes.
"""

import json
import os
import pathlib
from typing import Any

from absl import flags

from moejax import cli, compilation_cache
from moejax.errors import UserError

_STEP = flags.DEFINE_integer(
  "step", None, "Which checkpoint; default the newest.", lower_bound=0
)
_SPLIT = flags.DEFINE_enum(
  "split", "validation", ["train", "validation", "test"], "Which documents."
)
_FACTORS = flags.DEFINE_string(
  "eval_capacity_factor",
  None,
  "Capacity factors to compare, e.g. 1,1.25,2,dropless; default the config's.",
)
_BATCH = flags.DEFINE_integer(
  "batch_size",
  None,
  "Sequences per step; changes no result; default the config's.",
  lower_bound=1,
  upper_bound=2**31 - 1,
)
_LIMIT = flags.DEFINE_integer(
  "max_batches", 0, "Only so many batches; 0 is all.", lower_bound=0
)
_ROUTING = flags.DEFINE_bool(
  "routing", False, "Also write routing_STEP_SPLIT.json and .png: who serves what."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Directory for the files, if not the run's."
)


def main() -> None:
  # jax is imported after the flags are known to be right.
  from moejax.evaluate import perplexity
  from moejax.parallel import distributed

  workdir = cli.run_directory()
  output = _writable(pathlib.Path(_OUTPUT.value or workdir))
  factors = perplexity.parse_capacity_factors(_FACTORS.value) if _FACTORS.value else None
  facts = {f"--{name}": str(value) for name, value in _asked().items()}
  with distributed.joined(facts=facts):
    evaluate(workdir, output, factors)


def _asked() -> dict[str, Any]:
  """What all processes of one evaluation must have been asked for."""
  flag_values = {f.name: f.value for f in (_STEP, _SPLIT, _FACTORS, _BATCH, _LIMIT)}
  return {"workdir": flags.FLAGS.workdir} | flag_values | cli.overrides()


def evaluate(
  workdir: pathlib.Path, output: pathlib.Path, factors: tuple[float | None, ...] | None
) -> None:
  """Restores, evaluates and tells; in every process of a job alike."""
  import jax

  from moejax import data
  from moejax.evaluate import perplexity
  from moejax.parallel import host_memory
  from moejax.parallel.mesh import make_mesh
  from moejax.train.checkpoint import peek, restore_params
  from moejax.train.state import param_shardings

  host_memory.keep_freed_pages()
  tells = jax.process_index() == 0
  shapes, config, _ = peek(workdir, _STEP.value)
  config = cli.get_config(base=config)
  compilation_cache.enable(config.data.cache_dir)
  dataset = data.load(config.data, workdir=workdir, store=tells)
  model = perplexity.make_model(config, dataset.tokenizer.vocab_size)
  perplexity.check_params(model, shapes)
  mesh = make_mesh(perplexity.choose_mesh(config.mesh))
  # Straight to their places: no device need hold a whole model for a moment.
  shardings = param_shardings(model, mesh)
  params, _, meta = restore_params(workdir, _STEP.value, shardings)

  what: dict[str, Any] = {
    "model": model,
    "params": params,
    "dataset": dataset,
    "split": _SPLIT.value,
    "mesh": mesh,
    "batch_size": _BATCH.value or config.train.batch_size,
    "limit": _LIMIT.value,
  }
  evaluation = perplexity.evaluate(
    capacity_factors=factors or (config.moe.eval_capacity_factor,), **what
  )
  # Trained and held-out text are told apart by content: on other text than the run's,
  # such as another Python version's library, a "validation" document may have been seen.
  is_same_text = dataset.fingerprint == meta.get("dataset_fingerprint")
  evaluation = {
    "step": meta["step"],
    "workdir": str(workdir),
    "dataset_fingerprint": dataset.fingerprint,
    "is_training_dataset": is_same_text,
  } | evaluation
  evaluation |= perplexity.headline(evaluation, config.moe.eval_capacity_factor)
  if tells:
    _tell(evaluation, output)
  if _ROUTING.value:
    stem = output / f"routing_{meta['step']}_{_SPLIT.value}"
    _analyse_routing(what, stem, meta["step"], tells)


def _tell(evaluation: dict[str, Any], output: pathlib.Path) -> None:
  """Prints the tables and writes the files."""
  from moejax.evaluate import tables

  console = tables.make_console()
  tables.print_evaluation(console, evaluation)
  if not evaluation["is_training_dataset"]:
    console.print("Note: this is not the text the run was trained on.")
  file = output / f"eval_{evaluation['step']}_{_SPLIT.value}.json"
  _write(file, evaluation)
  if not (_SPLIT.value != "validation" or _LIMIT.value or cli.overrides()):
    _renew(output / "eval.json", evaluation)
  print(file)


def _analyse_routing(
  what: dict[str, Any], stem: pathlib.Path, step: int, tells: bool
) -> None:
  from moejax.evaluate import routing_analysis

  analysis = routing_analysis.analyse(**what)
  if not tells:
    return
  _write(stem.with_suffix(".json"), {"step": step} | analysis)
  routing_analysis.draw(analysis, stem.with_suffix(".png"))
  print(stem.with_suffix(".json"))
  print(stem.with_suffix(".png"))


def _writable(directory: pathlib.Path) -> pathlib.Path:
  """Refuses now what would otherwise fail after the whole evaluation."""
  if not directory.is_dir() or not os.access(directory, os.W_OK):
    raise UserError(
      f"{directory} is not a directory one can write to. Give another with --output=DIR."
    )
  return directory


def _renew(path: pathlib.Path, evaluation: dict[str, Any]) -> None:
  """Keeps what else the end of training wrote about the same step (its baselines)."""
  try:
    old = json.loads(path.read_text())
  except (OSError, ValueError):
    old = {}
  _write(path, (old if old.get("step") == evaluation["step"] else {}) | evaluation)


def _write(path: pathlib.Path, values: dict[str, Any]) -> None:
  """Whole or not at all: a reader never sees half a file."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  temporary.write_text(json.dumps(values, indent=1) + "\n")
  temporary.replace(path)


if __name__ == "__main__":
  cli.define_config(default=None)
  compilation_cache.define_flag()
  cli.run(main)
