"""Compare runs: results.csv, figures, tables and one offline page.

  python -m tools.compare RUN RUN ... [--by=moe.router] [--out=DIR] [--title=TEXT]

Each RUN is the directory of a training run, finished or not; it need not come from a
sweep. A directory with a folder `runs` in it, such as that of a sweep, stands for all
runs below. Runs that differ only in their seed become one setting with a mean and a
spread. Prints what the runs show and what they do not show yet (docs/sweeps.md).

--by names the fields that the figures are drawn over, the most important first; without
it, they are those in which the runs differ.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from moejax.cli import arguments
from moejax.cli import flags as cli
from moejax.config import text as config_text
from moejax.errors import UserError
from moejax.run.files import CONFIG_FILE
from moejax.storage.paths import is_url, refuse_url
from moejax.sweep.execution.directory import TIMING_FILE
from moejax.sweep.spec import RUNS, SPEC_FILE


def main() -> int:
  options = _parser().parse_args()
  fields = tuple(name for name in (options.by or "").split(",") if name)
  for name in fields:
    config_text.check_name(name)
  run_dirs = find(options.runs)
  out = arguments.writable(pathlib.Path(options.out))
  # jax is imported after the command line is checked.
  from moejax.sweep.execution import identity, states, view
  from moejax.sweep.report import page as report

  out.mkdir(parents=True, exist_ok=True)
  said = report.write(
    out,
    run_dirs,
    options.title or f"Comparison of {len(run_dirs)} runs",
    timing=_timing(options.runs),
    states={
      path.name: view.state(states.examine(path))
      for path in run_dirs
      if (path / identity.RECORD_FILE).exists()
    },
    variants=_variants(options.runs),
    axes=fields,
    base=cli.load_config(cli.DEFAULT_CONFIG),
  )
  said.show()
  print(out / report.PAGE_FILE)
  return 0


def _parser() -> cli.Parser:
  parser = cli.Parser(__doc__)
  parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
  parser.add_argument("--by", help="fields to draw over, such as moe.router,moe.hidden")
  parser.add_argument("--out", default="comparison", help="directory for the files")
  parser.add_argument("--title", help="title of the page")
  return parser


def find(given: Sequence[str]) -> list[pathlib.Path]:
  """Returns the runs' directories; a sweep's directory is replaced by its runs.

  Args:
    given: directories from the command line.

  Raises:
    UserError: one of them has no run, or is given twice.
  """
  found: list[pathlib.Path] = []
  for word in given:
    if is_url(word):
      refuse_url(word)
    path = pathlib.Path(word)
    if not path.is_dir():
      what = "is a file" if path.exists() else "does not exist"
      raise UserError(f"{word} {what}. Give the directory of a training run.")
    below = [] if (path / CONFIG_FILE).exists() else sorted((path / RUNS).glob("*"))
    runs = [run for run in below if (run / CONFIG_FILE).exists()]
    if below and not runs:
      raise UserError(f"{word}: none of its {len(below)} runs has started. Start them.")
    found += runs or [path]
  whole = [path.resolve() for path in found]
  for i, path in enumerate(whole):
    if path in whole[:i]:
      raise UserError(f"{found[i]} is given twice. Leave one out.")
  return found


def _variants(given: Sequence[str]) -> dict[str, str]:
  """Returns the names of settings in the sweeps among the arguments."""
  from moejax.sweep.points import stored

  found: dict[str, str] = {}
  for word in given:
    if (pathlib.Path(word) / SPEC_FILE).exists():
      found |= stored.variant_names(stored.read(pathlib.Path(word))[1])
  return found


def _timing(given: Sequence[str]) -> dict[str, Any]:
  """Returns the timed shapes of all sweeps among the arguments."""
  from moejax import files

  shapes: dict[str, Any] = {}
  for word in given:
    path = pathlib.Path(word) / TIMING_FILE
    try:
      found = files.read_json(path)
    except FileNotFoundError:
      continue
    except (OSError, ValueError) as e:
      raise UserError(
        f"{path} cannot be read ({e}). Delete it to go on without it."
      ) from e
    if isinstance(found, dict):
      shapes |= {f"{word}/{k}": v for k, v in found.items()}
  return shapes


def run() -> None:
  """Runs the program."""
  try:
    sys.exit(main())
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


if __name__ == "__main__":
  run()
