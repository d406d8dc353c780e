"""Analyze what a run's routers do: loads, pairs, flow, preferences, drops, what-if.

  python -m experiments.analyze --workdir=DIR [--split=validation] [--text=FILE]
    [--out=DIR] [--max_batches=N]

Writes analysis.json, figures/ and index.html (open it in a browser; it needs no network)
to --out, by default DIR/analysis. docs/analysis.md says what each measure means and when
it misleads.
"""

import os
import pathlib
import sys
from typing import Any

from absl import flags

from moejax.cli import flags as cli
from moejax.cli import restored
from moejax.errors import UserError
from moejax.run import compilation_cache

_STEP = flags.DEFINE_integer(
  "step", None, "Which checkpoint; default the newest.", lower_bound=0
)
_SPLIT = flags.DEFINE_enum(
  "split", "validation", ["train", "validation", "test"], "Which documents."
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
  "Sequences per step, raised to whole routing groups; changes no result.",
  lower_bound=1,
  upper_bound=2**31 - 1,
)
_LIMIT = flags.DEFINE_integer(
  "max_batches", 0, "Only so many batches; 0 is all.", lower_bound=0
)


def main() -> None:
  # jax is imported after the flags are checked.
  from moejax.launch import distributed

  workdir = cli.run_directory()
  if _TEXT.value and flags.FLAGS["split"].present:
    raise UserError("--split: --text has no splits and is read whole. Leave one out.")
  out = _writable(pathlib.Path(_OUT.value) if _OUT.value else workdir / "analysis")
  facts = {f"--{name}": str(value) for name, value in _asked().items()}
  with distributed.joined(facts=facts):
    analyze(workdir, out)


def _asked() -> dict[str, Any]:
  """Returns the settings that must agree in all processes."""
  given = {f.name: f.value for f in (_STEP, _SPLIT, _TEXT, _BATCH, _LIMIT)}
  return {"workdir": flags.FLAGS.workdir} | given | cli.overrides()


def analyze(workdir: pathlib.Path, out: pathlib.Path) -> None:
  """Restores a run, collects and writes; called in every process of a job."""
  from moejax.analysis import collect, report, summary
  from moejax.run import progress as progress_lib

  run = restored.restore(_request(workdir))
  what, dataset = run.arguments(), run.dataset
  words = collect.vocabulary(
    _padded(dataset.token_counts(run.split), run.model.vocab_size)
  )
  reporter = progress_lib.make_reporter(
    0, process_index=0 if run.tells else 1, stream=sys.stderr
  )
  try:
    total = _covered(run)
    with progress_lib.watched(reporter, f"{run.split}, tokens", total) as progress:
      sums = collect.collect(words=words, limit=_LIMIT.value, progress=progress, **what)
  finally:
    reporter.close()
  found = run.facts | summary.summarise(
    sums, run.model, words, list(dataset.domains), dataset.tokenizer.pieces
  )
  if run.tells:
    for path in report.write(found, out):
      print(path)


def _request(workdir: pathlib.Path) -> restored.Request:
  return restored.Request(
    workdir=workdir,
    step=_STEP.value,
    split=_SPLIT.value,
    text=_TEXT.value,
    batch_size=_BATCH.value or 0,
  )


def _covered(run: restored.Run) -> int:
  """Returns the tokens that are read."""
  length = run.config.data.sequence_length
  total = run.dataset.num_tokens(run.split)
  return min(_LIMIT.value * run.batch_size * length or total, total)


def _padded(counts: Any, size: int) -> Any:
  """Returns counts for every id of the model, which may have more than the tokenizer."""
  import numpy as np

  return np.pad(counts, (0, max(size - len(counts), 0)))[:size]


def _writable(directory: pathlib.Path) -> pathlib.Path:
  """Makes the output directory.

  Raises:
    UserError: it cannot be made or written.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"--out={directory} cannot be made: {error.strerror}. Give another directory."
    ) from None
  if not os.access(directory, os.W_OK):
    raise UserError(f"--out={directory} cannot be written. Give another directory.")
  return directory


def run() -> None:
  """Runs the program."""
  cli.define_config(default=None)
  compilation_cache.define_flag()
  cli.run(main)


if __name__ == "__main__":
  run()
