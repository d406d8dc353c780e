"""Lists the available choices: `--list=configs|routers|datasets|dispatchers`."""

import ast
import pathlib

from moejax.options import show

LISTS = ("configs", "routers", "datasets", "dispatchers")


def shipped_configs() -> dict[str, pathlib.Path]:
  """Returns the shipped config files by name (path under configs/, no .py), sorted.

  They are next to moejax in a clone, and inside it if it is installed (see setup.py).
  """
  package = pathlib.Path(__file__).parents[1]
  places = (package / "shipped_configs", package.parent / "configs")
  root = next((place for place in places if place.is_dir()), places[0])
  found = {
    file.relative_to(root).with_suffix("").as_posix(): file
    for file in root.rglob("*.py")
    if not file.name.startswith("_")
  }
  return dict(sorted(found.items()))


def describe(what: str) -> str:
  """Returns one line per choice, name first, in registry order."""
  rows = {
    "configs": _configs,
    "routers": _routers,
    "datasets": _datasets,
    "dispatchers": _dispatchers,
  }[what]()
  width = max(map(len, rows), default=0)
  return "".join(f"{name:{width}}  {text}".rstrip() + "\n" for name, text in rows.items())


def _first_line(doc: str | None) -> str:
  return (doc or "").strip().partition("\n")[0]


def _configs() -> dict[str, str]:
  # Parsed, not run, so that a config with missing dependencies is still listed.
  return {
    name: _first_line(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))))
    for name, file in shipped_configs().items()
  }


def _routers() -> dict[str, str]:
  from moejax.routing.registry import ROUTERS, options_by_name

  rows = {}
  for name, router in ROUTERS.items():
    rows[name] = router.summary
    for option, about in options_by_name(name).items():
      words = f" ({', '.join(about.choices)})" if about.choices else ""
      rows[f"  {name}.{option}={show(about.default)}"] = f"  {about.text}{words}"
  return rows


def _dispatchers() -> dict[str, str]:
  from moejax.dispatch.registry import SUMMARIES

  rows = {"auto": "chosen by platform and capacity, by a written rule"}
  return rows | dict(SUMMARIES)


def _datasets() -> dict[str, str]:
  from moejax.data.types import LOCAL

  return LOCAL | {"NAME": "any TFDS text set by its name, such as lm1b, c4 or wiki40b"}
