"""The API reference, from docstrings: one page per module, with search.

  python -m tools.api_docs [--out=site]      (make docs)

Needs pdoc, of the extra `dev`. A name that cannot be resolved, or any other warning, is
an error: exit code 1.
"""

import os
import pathlib
import pkgutil
import sys
import warnings
from collections.abc import Iterable

from moejax.cli import flags as cli


def build(out: pathlib.Path) -> int:
  """Writes the pages, and returns how many there are."""
  # Modules are imported to be read; none may ask for a device.
  os.environ["JAX_PLATFORMS"] = "cpu"
  import pdoc
  import pdoc.render

  import moejax

  # pdoc does not see names that resolve on first use.
  for name in moejax.__all__:
    setattr(moejax, name, getattr(moejax, name))
  pdoc.render.configure(docformat="google", footer_text=f"moejax {moejax.__version__}")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    # A TypedDict does not name the TypedDict that it extends among its bases.
    warnings.filterwarnings("ignore", "Cannot determine where .* is taken from")
    pdoc.pdoc("moejax", *_modules(moejax.__path__), output_directory=out)
  return len(list(out.rglob("*.html")))


def _modules(path: Iterable[str]) -> list[str]:
  """Returns moejax's own packages and modules; what is in a package comes with it."""
  # Not found from moejax itself, whose __all__ names no modules. Programs say what they
  # are by --help, and cannot be imported together: several define the same flags.
  found = {module.name for module in pkgutil.iter_modules(path, "moejax.")}
  return sorted(found - {"moejax.cli"})


def main(argv: list[str] | None = None) -> int:
  parser = cli.Parser(__doc__)
  parser.add_argument("--out", default="site", help="output folder; created if missing")
  args = parser.parse_args(argv)
  out = pathlib.Path(args.out)
  try:
    count = build(out)
  except ImportError as error:
    if error.name != "pdoc":
      raise
    print("error: pdoc is not installed: pip install -e '.[dev]'", file=sys.stderr)
    return 2
  except Warning as warning:
    print(f"error: {warning}", file=sys.stderr)
    return 1
  print(f"{count} pages: open {out / 'index.html'}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
