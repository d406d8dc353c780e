"""Running Python files of a user: a config, a sweep, a router."""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator


def execute(module: types.ModuleType) -> None:
  """Runs the file of a module that was made from its spec; raises whatever it raises."""
  _find_configs()
  sys.modules[module.__name__] = module  # A class looks here for its file.
  assert module.__spec__ is not None and module.__spec__.loader is not None
  with _no_bytecode():
    module.__spec__.loader.exec_module(module)


@contextlib.contextmanager
def _no_bytecode() -> Iterator[None]:
  """Leaves no __pycache__ beside the file, which may be in a run's directory."""
  before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
  try:
    yield
  finally:
    sys.dont_write_bytecode = before


def _find_configs() -> None:
  """Makes `from configs import default` work in a Python file of a user.

  The wheel has configs/ as data of moejax, under another name.
  """
  if importlib.util.find_spec("configs") is None:
    with contextlib.suppress(ModuleNotFoundError):
      sys.modules["configs"] = importlib.import_module("moejax.shipped_configs")
