"""Tasks of EleutherAI's lm-evaluation-harness on a run, for `experiments.evaluate`.

The harness's own command line, with moejax among its models:

  python -m moejax.cli.harness run --model moejax --model_args workdir=RUN --tasks NAME
"""

import hashlib
import json
import os
import pathlib
import re
from typing import Any

from moejax import files
from moejax.errors import UserError

_LONGEST = 100
"""Most letters of the tasks in a file's name."""


def evaluate(
  workdir: pathlib.Path,
  output: pathlib.Path,
  tasks: str,
  *,
  step: int | None,
  batch_size: int,
  truncate: bool,
  limit: int | None,
) -> None:
  """Runs tasks, prints the harness's table and writes its results.

  Args:
    workdir: of the run.
    output: directory for the file.
    tasks: comma-separated names of the harness, or YAML files of tasks.
    step: which checkpoint; None is the newest.
    batch_size: rows per call of the model.
    truncate: see `harness.Adapter`.
    limit: most documents of each task; None is all.

  Raises:
    UserError: a task is missing or needs the network, the run has no tokenizer, or a
      request does not fit the context.
  """
  _task_files(tasks)
  # Before the libraries that read them are imported. A user who wants the network sets
  # them to 0.
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
  from moejax.evaluate import harness

  language_model = harness.language_model()
  found = _load(tasks)
  model = language_model(
    str(workdir), step=step, batch_size=batch_size, truncate=truncate
  )
  from lm_eval import evaluator, utils  # pyright: ignore[reportMissingImports]

  results: Any = evaluator.evaluate(model, found, limit=limit)
  if results is None:  # Only the first process has them.
    return
  print(utils.make_table(results))
  stem = _file_name(model.run.step, tasks, limit, truncate, _digest(tasks, results))
  file = output / f"{stem}.json"
  kept = {name: results[name] for name in ("results", "versions", "n-samples")}
  asked = {"tasks": tasks, "limit": limit, "truncate": truncate}
  text = json.dumps({"step": model.run.step} | asked | kept, indent=1, default=str)
  files.write_text(file, text + "\n")
  print(file)


def _file_name(
  step: int, tasks: str, limit: int | None, truncate: bool = False, digest: str = ""
) -> str:
  """Returns a file name without suffix that describes the request, so that the results of
  other tasks and settings stay; see `_digest`."""
  names = "_".join(pathlib.Path(name).stem for name in _names(tasks))
  if len(names) > _LONGEST:
    names = hashlib.sha256(names.encode()).hexdigest()[:8]
  parts = ["tasks", str(step), names.replace(os.sep, "_")]
  parts += [] if limit is None else ["first", str(limit)]
  parts += ["truncate"] if truncate else []
  return "_".join([*parts, digest] if digest else parts)


def _digest(tasks: str, results: Any) -> str:
  """Returns a digest of tasks and their texts if YAML files describe them; else "".

  Two files may have the same stem, and a file may be edited or read other data.

  Args:
    tasks: as given.
    results: results of the harness, with samples.
  """
  if not _task_files(tasks):
    return ""
  hashes = ("doc_hash", "prompt_hash", "target_hash")
  texts = {
    # With several processes, their order differs.
    task: sorted(
      [sample["doc_id"], *(sample[name] for name in hashes)] for sample in found
    )
    for task, found in results["samples"].items()
  }
  text = json.dumps([results["configs"], texts], sort_keys=True, default=str)
  # The addresses of functions in a task differ between processes.
  text = re.sub(r" at 0x[0-9a-f]+", "", text)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _names(tasks: str) -> list[str]:
  return [name.strip() for name in tasks.split(",") if name.strip()]


def _task_files(tasks: str) -> list[str]:
  """Returns the tasks that are YAML files.

  Raises:
    UserError: a file is missing.
  """
  paths = [name for name in _names(tasks) if name.endswith((".yaml", ".yml"))]
  for path in paths:
    if not pathlib.Path(path).is_file():
      raise UserError(f"--tasks={path}: no such file.")
  return paths


def _load(tasks: str) -> Any:
  """Returns the harness's tasks for the names and files.

  Raises:
    UserError: see `evaluate`.
  """
  from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

  names, paths = _names(tasks), _task_files(tasks)
  # Reading all its own tasks takes the harness seconds.
  manager = TaskManager(include_defaults=len(paths) < len(names))
  known = set(manager.all_tasks)
  for name in names:
    if name not in paths and name not in known:
      raise UserError(
        f"--tasks={name}: lm_eval has no such task. Give a name from `lm_eval ls tasks`, "
        "or a YAML file that describes one."
      )
  try:
    return manager.load(names)
  except Exception as error:
    words = (str(error).splitlines() or ["no message"])[0]
    raise UserError(
      f"--tasks={tasks}: the task cannot be loaded ({type(error).__name__}: {words}). If "
      "its data are on the network, set HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0, or "
      "use a local file."
    ) from error


def main() -> None:
  from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

  from moejax.evaluate import harness

  harness.register()
  cli_evaluate()


if __name__ == "__main__":
  main()
