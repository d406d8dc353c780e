"""The shipped configs, where only the wheel is installed."""

import contextlib
import importlib
import importlib.util
import sys


def find_configs() -> None:
  """Makes `from configs import default` work in a Python file of a user.

  The wheel has configs/ as data of moejax, under another name.
  """
  if importlib.util.find_spec("configs") is None:
    with contextlib.suppress(ModuleNotFoundError):
      sys.modules["configs"] = importlib.import_module("moejax.shipped_configs")
