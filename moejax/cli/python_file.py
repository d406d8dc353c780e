"""Runs a Python file that describes a config or a sweep.

A file may import anything and fail in any way; the error is one line that names the file
and the line in it.
"""

import importlib.util
import pathlib
import traceback
import types
from typing import TypeVar

from moejax.errors import ConfigError
from moejax.user_file import execute

_T = TypeVar("_T")


def load(
  flag: str, file: pathlib.Path, function: str, kind: type[_T], example: str
) -> tuple[_T, types.ModuleType]:
  """Runs a file and returns what its function returns, unchecked, and its module.

  Args:
    flag: as given, such as `--config=mine.py`.
    file: an existing file.
    function: name of the function that it must have, without arguments.
    kind: class of the object that the function must return.
    example: path of an example, for the error.

  Raises:
    ConfigError: the file fails, or the function does not return a `kind`.
  """
  name = f"moejax_described_{file.stem}"
  spec = importlib.util.spec_from_file_location(name, file)
  if spec is None or spec.loader is None:
    raise ConfigError(f"{flag}: not a Python file (its name must end in .py).")
  module = importlib.util.module_from_spec(spec)
  try:
    execute(module)
    make = getattr(module, function, None)
    found = make() if callable(make) else None
  except (ConfigError, KeyboardInterrupt):
    raise
  except BaseException as error:
    # Not only Exception: a file that calls sys.exit must not end the program silently.
    raise ConfigError(f"{flag} {_failure(error, file)}") from error
  if not isinstance(found, kind):
    raise ConfigError(
      f"{flag}: it needs a function {function}() that returns a "
      f"{_public_name(kind)}, and it "
      + ("returns a " + type(found).__name__ if callable(make) else "has none")
      + f". See {example}."
    )
  return found, module


def _public_name(kind: type) -> str:
  """Returns the public name of a class, as in an import: `moejax.config.Config`."""
  module = kind.__module__.removesuffix(".schema")
  return f"{module}.{kind.__name__}"


def _failure(error: BaseException, file: pathlib.Path) -> str:
  """Returns where and why a file fails, in one line."""
  if isinstance(error, SyntaxError):
    text = f": {error.text.strip()}" if error.text else ""
    return f"fails at {error.filename}:{error.lineno}: SyntaxError: {error.msg}{text}"
  # The innermost line of the file itself: the error may be deep in a library.
  frames = traceback.extract_tb(error.__traceback__)
  own = [frame.lineno for frame in frames if frame.filename == str(file)]
  where = f"{file}:{own[-1]}" if own else str(file)
  if isinstance(error, SystemExit):
    return (
      f"exits at {where} ({error.code!r}). Such a file must only return a description."
    )
  words = " ".join(str(error).split())
  return f"fails at {where}: {type(error).__name__}{f': {words}' if words else ''}"
