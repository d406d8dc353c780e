"""Pins every dependency for every supported Python, in constraints.txt.

  python -m tools.update_constraints python3.11 python3.12 python3.13

Asks pip, in a fresh environment of each interpreter given, what it would install
for the project with its `dev`, `hf` and `browser` extras, and writes one file in which a
package whose version depends on the Python carries a marker. Give all supported
interpreters at once: the file is rewritten, not merged. The extras for
accelerators and for Beam are not pinned: jax's own extras pin their plugins.
"""

import collections
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "constraints.txt"
EXTRAS = "dev,hf,browser"
HEADER = """\
# Made by tools/update_constraints.py for Python {pythons}; do not edit.
# A marker stands where the version depends on the Python.
"""

Pins = dict[str, str]
"""Package to version."""


def resolve(python: str) -> tuple[str, Pins]:
  """What a fresh environment of this interpreter gets: (3.11, its pins)."""
  with tempfile.TemporaryDirectory() as directory:
    subprocess.run([python, "-m", "venv", directory], check=True)
    inside = str(pathlib.Path(directory) / "bin" / "python")
    report = pathlib.Path(directory) / "report.json"
    command = [inside, "-m", "pip", "install", "--quiet", "--dry-run"]
    command += ["--ignore-installed", f"--report={report}", f"{ROOT}[{EXTRAS}]"]
    subprocess.run(command, check=True)
    found = json.loads(report.read_text())
  chosen = [item["metadata"] for item in found["install"]]
  pins = {normal_name(item["name"]): item["version"] for item in chosen}
  del pins["moejax"]
  return found["environment"]["python_version"], pins


def normal_name(name: str) -> str:
  """A package's name as pip compares it: interpreters report different spellings."""
  return re.sub(r"[-_.]+", "-", name).lower()


def merge(pins: Mapping[str, Pins]) -> list[str]:
  """Constraint lines, sorted by package, with a marker where versions differ.

  Args:
    pins: Python version such as 3.11 to its pins.
  """
  pythons = sorted(pins, key=_key)
  lines = []
  for package in sorted({p for chosen in pins.values() for p in chosen}, key=str.lower):
    by_version = collections.defaultdict(list)
    for python in pythons:
      if package in pins[python]:
        by_version[pins[python][package]].append(python)
    for version, where in by_version.items():
      # One version for all that need it also serves a Python that so far needs none.
      marker = "" if len(by_version) == 1 else f" ; {_marker(where, pythons)}"
      lines.append(f"{package}=={version}{marker}")
  return lines


def _marker(where: Sequence[str], pythons: Sequence[str]) -> str:
  """An interval of Python versions; the ends are open so that new ones are covered."""
  if list(where) == list(pythons[: len(where)]):
    return f'python_version <= "{where[-1]}"'
  if list(where) == list(pythons[-len(where) :]):
    return f'python_version >= "{where[0]}"'
  return " or ".join(f'python_version == "{python}"' for python in where)


def _key(version: str) -> tuple[int, ...]:
  return tuple(map(int, version.split(".")))


def main() -> None:
  if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
    print(__doc__)
    sys.exit(0 if sys.argv[1:] in (["--help"], ["-h"]) else 2)
  pins = dict(map(resolve, sys.argv[1:]))
  header = HEADER.format(pythons=", ".join(sorted(pins, key=_key)))
  OUTPUT.write_text(header + "".join(f"{line}\n" for line in merge(pins)))
  print(f"{OUTPUT}: {len(merge(pins))} pins")


if __name__ == "__main__":
  main()
