"""Imports point one way: between packages as between files, also inside functions.

Every file is parsed, not run. An import inside a function or under TYPE_CHECKING is an
arrow as any other: it may save a second at the start, and makes no circle good.
"""

import ast
import functools
import graphlib
import pathlib
from collections.abc import Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).parents[1]

FLOORS = (
  (
    "types",
    "user_file",
    "errors",
    "files",
    "options",
    "parts",
    "platform",
    "splitmix",
    "storage",
    "version",
  ),
  ("routing", "config", "cost", "alarms"),
  ("experts", "sharding"),
  ("dispatch",),
  ("exchange",),
  ("layers",),
  ("models",),
  ("data",),
  ("checkpoint", "run", "launch", "hlo"),
  ("train", "evaluate"),
  ("sweep", "plan", "analysis", "surgery", "interop", "device_check", "deploy"),
  ("cli",),
)
"""Packages and files of moejax from the ground up. A room may look into rooms below it
and beside it, and never up; beside it, as long as nobody looks back."""

HOUSES = ("configs", "experiments", "examples", "tools", "tests")
"""What stands on top of moejax, and is never imported by it."""

KNOWN: dict[tuple[str, str], str] = {}
"""Arrows back that are there today, (file, what it imports), with the reason for each. A
line that is no longer needed is an error, so the list only shrinks."""


def modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """The file of every module below moejax, by its dotted name."""
  found = {}
  for path in sorted((root / "moejax").rglob("*.py")):
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    found[name.removesuffix(".__init__")] = path
  return found


def imported(tree: ast.AST, known: Mapping[str, object]) -> Iterator[str]:
  """Names of modules that a file imports: for a symbol, the module it is taken from."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"line {node.lineno}: a relative import"
      for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        yield whole if whole in known else node.module or ""


@functools.cache
def arrows(root: pathlib.Path = ROOT) -> dict[str, set[str]]:
  """Which modules of this repository each module of moejax imports."""
  files = modules(root)
  ours = ("moejax", *HOUSES)
  return {
    name: {
      other
      for other in imported(ast.parse(path.read_text(encoding="utf-8")), files)
      if other.split(".")[0] in ours and other != name
    }
    for name, path in files.items()
  }


def room(module: str) -> str:
  """The package, or file, directly below moejax."""
  return module.split(".")[1] if "." in module else ""


def floor(module: str) -> int:
  """Counted from the ground; what stands on top of moejax is above all."""
  if module.split(".")[0] != "moejax":
    return len(FLOORS)
  return next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


def back(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
  """The arrows that point up."""
  return {
    (module, other)
    for module, others in graph.items()
    for other in others
    if room(module) and room(other) and floor(other) > floor(module)
  } | {(m, o) for m, others in graph.items() for o in others if o.split(".")[0] in HOUSES}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
  """One circle, its first member again at the end; empty if there is none."""
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    return error.args[1][::-1]
  return []


def without_known(graph: dict[str, set[str]]) -> dict[str, set[str]]:
  return {m: {o for o in others if (m, o) not in KNOWN} for m, others in graph.items()}


def between_rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
  """The same arrows between packages; those inside one are left out."""
  rooms: dict[str, set[str]] = {}
  for module, others in graph.items():
    if room(module):
      here = rooms.setdefault(room(module), set())
      here |= {room(o) for o in others if room(o)} - {room(module)}
  return rooms


def test_every_room_has_a_floor():
  """A new package says where it belongs, and the table names no package twice."""
  named = [name for rooms in FLOORS for name in rooms]
  assert len(named) == len(set(named))
  assert {room(m) for m in modules(ROOT) if room(m)} <= set(named)


def test_no_arrow_points_up():
  """Each file imports only from its own floor and those below."""
  found = back(arrows())
  assert found - set(KNOWN) == set()


def test_known_arrows_are_still_there():
  """What was mended leaves the list; each that is on it has its reason."""
  assert set(KNOWN) <= {(m, o) for m, others in arrows().items() for o in others}
  assert all(KNOWN.values())


def test_packages_make_no_circle():
  """Rooms on one floor may look at each other, in one direction."""
  assert circle(between_rooms(without_known(arrows()))) == []


def test_files_make_no_circle():
  """Inside a package too."""
  assert circle(without_known(arrows())) == []


@pytest.mark.parametrize(
  ("statement", "seen"),
  [
    ("import moejax.train.loop", "moejax.train.loop"),
    ("from moejax.train import loop", "moejax.train.loop"),
    ("from moejax.train.loop import train", "moejax.train.loop"),
    ("def f():\n  from moejax.train import loop as l", "moejax.train.loop"),
    ("if TYPE_CHECKING:\n  import moejax.train.loop as l", "moejax.train.loop"),
    ("from tools import count", "tools"),
  ],
)
def test_an_arrow_back_is_seen(statement, seen, tmp_path):
  """However it is spelt and wherever it stands."""
  package = tmp_path / "moejax"
  for name in ("routing", "train"):
    (package / name).mkdir(parents=True)
  (package / "train" / "loop.py").write_text("from moejax.routing import base\n")
  (package / "routing" / "base.py").write_text(statement + "\n")
  graph = arrows(tmp_path)
  assert back(graph) == {("moejax.routing.base", seen)}
  if seen != "tools":
    assert circle(graph) and circle(between_rooms(graph))
