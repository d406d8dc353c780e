"""`moejax PROGRAM ...`: one command for all programs.

  moejax train --config=default --workdir=runs/default
  moejax evaluate --help

The same programs run in a clone as `python -m experiments.PROGRAM` or
`python -m tools.PROGRAM`, with the same flags.
"""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

from moejax.cli.guard import guarded
from moejax.errors import UserError, did_you_mean
from moejax.version import __version__

PROGRAMS = {
  "train": "moejax.cli.train",
  "evaluate": "moejax.cli.evaluate",
  "analyze": "moejax.cli.analyze",
  "profile": "moejax.cli.profile",
  "sweep": "moejax.cli.sweep",
  "generate": "moejax.cli.generate",
  "convert": "moejax.cli.convert",
  "surgery": "moejax.cli.surgery",
  "count": "moejax.cli.count",
  "compare": "moejax.cli.compare",
  "collectives": "moejax.cli.collectives",
  "compile-for": "moejax.cli.compile_for",
  "plan": "moejax.cli.plan",
  "launch": "moejax.cli.launch",
  "launch-local": "moejax.cli.launch_local",
  "check-device": "moejax.cli.check_device",
  "fit-law": "moejax.cli.fit_law",
  "inspect-checkpoint": "moejax.cli.inspect_checkpoint",
}
"""Each module has a docstring, shown by --help, and a function `run`."""

_HELP = ("help", "--help", "-h")


def main() -> None:
  """Runs the program named by the first argument."""
  name, *rest = sys.argv[1:] or ["help"]
  if name in _HELP:
    guarded(lambda: print(overview(), flush=True))
    return
  if name == "--version":
    print(__version__)
    return
  if name not in PROGRAMS:
    remedy = did_you_mean(name, PROGRAMS)
    print(f"error: moejax {name}: there is no such program. {remedy}", file=sys.stderr)
    sys.exit(UserError.exit_code)
  sys.argv = [f"moejax {name}", *rest]
  importlib.import_module(PROGRAMS[name]).run()


def overview() -> str:
  """Returns one line per program, without importing them."""
  rows = [f"  {name:20}{_summary(module)}" for name, module in PROGRAMS.items()]
  lines = ["moejax PROGRAM --flag=value ...", "", *rows, ""]
  return "\n".join([*lines, "moejax PROGRAM --help shows its flags."])


def _summary(module: str) -> str:
  spec = importlib.util.find_spec(module)
  assert spec is not None and spec.origin is not None
  tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
  return (ast.get_docstring(tree) or "").partition("\n")[0]


if __name__ == "__main__":
  main()
