"""Does the suite notice when routing is wrong? Breaks it on purpose, and counts.

  python -m tools.mutation_check [--jobs=2] [--only=TEXT]

Copies the code, makes one of the edits in `tools.mutants` (a slot too many, padding
counted, a gate not renormalised ...), runs the tests of routing, layers and recorded
outputs until one fails, and goes on to the next. Exit code 1 if an edit is noticed by
no test, or if the tests fail without any.
"""

import concurrent.futures
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from moejax.cli import arguments
from moejax.cli import flags as cli
from tools.mutants import MUTANTS, Mutant

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = (
  "moejax",
  "tests",
  "configs",
  "examples",
  "experiments",
  "docs",
  "pyproject.toml",
)
TESTS = ("tests/routing", "tests/layers", "tests/golden")


def check(mutant: Mutant | None, cache: str) -> tuple[str, str]:
  """Runs the tests on a copy with one edit.

  Args:
    mutant: the edit; None leaves the copy as it is.
    cache: where compiled functions are kept, for most are the same in all copies.

  Returns:
    ("caught", the first test that failed), ("missed", ""), or ("broken", why) where
    the tests could not be run at all, which proves nothing.
  """
  with tempfile.TemporaryDirectory() as name:
    directory = pathlib.Path(name)
    for part in COPIED:
      copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
      copy(ROOT / part, directory / part)
    if mutant is not None:
      edit(directory / "moejax" / "routing" / mutant.file, mutant)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    # The list of mutants notices every edit, which says nothing about the suite.
    command += ["--ignore=tests/routing/test_mutants.py"]
    command += ["-m", "not slow", "--tb=no", "-rf", *TESTS]
    environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": cache,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    done = subprocess.run(
      command, cwd=directory, env=environment, capture_output=True, text=True
    )
  if done.returncode == 0:
    return "missed", ""
  failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
  if done.returncode == 1 and failed:
    return "caught", failed[0].split()[1]
  return "broken", (done.stdout + done.stderr)[-500:]


def edit(path: pathlib.Path, mutant: Mutant) -> None:
  """Makes the edit.

  Raises:
    ValueError: its text does not stand there exactly once: the list is out of date.
  """
  text = path.read_text("utf-8")
  if text.count(mutant.old) != 1:
    raise ValueError(
      f"{mutant.file} contains {mutant.old!r} {text.count(mutant.old)} times instead of "
      "once: bring tools/mutants.py up to date."
    )
  path.write_text(text.replace(mutant.old, mutant.new), "utf-8")


def main() -> int:
  parser = cli.Parser(__doc__)
  parser.add_argument(
    "--jobs", type=arguments.at_least(1), default=2, help="mutants tested at a time"
  )
  parser.add_argument(
    "--only", default="", help="run only mutants whose name contains this"
  )
  args = parser.parse_args()
  mutants = [m for m in MUTANTS if args.only in m.name]
  with tempfile.TemporaryDirectory() as cache:
    status, why = check(None, cache) if not args.only else ("missed", "")
    if status != "missed":
      print(f"The tests fail without any edit ({status}): {why}")
      return 1
    caught = 0
    break_and_test = functools.partial(check, cache=cache)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
      for mutant, (status, why) in zip(
        mutants, pool.map(break_and_test, mutants), strict=True
      ):
        caught += status == "caught"
        print(f"{status:7} {mutant.file:18} {mutant.name:42} {why}", flush=True)
  print(f"{caught} of {len(mutants)} caught")
  return int(caught < len(mutants))


if __name__ == "__main__":
  sys.exit(main())
