"""Kinds of arguments of the programs that have no config."""

import argparse
import pathlib
import tempfile
from collections.abc import Callable, Collection
from typing import Any

from moejax import files
from moejax.errors import UserError

_MOST = 1_000_000


def at_least(low: float) -> Callable[[str], Any]:
  """Returns a parser of numbers for argparse; numbers have the type of `low`."""

  def number(text: str) -> Any:
    value = type(low)(text)
    if not low <= value <= _MOST:
      raise argparse.ArgumentTypeError(f"{text}: at least {low}, at most {_MOST:,}")
    return value

  number.__name__ = "whole number" if isinstance(low, int) else "number"
  return number


def split_names(
  parser: argparse.ArgumentParser, args: argparse.Namespace, **known: Collection[str]
) -> None:
  """Splits arguments like A,B into lists, in place; an unknown name is an error."""
  for argument, names in known.items():
    values = [v for v in getattr(args, argument).split(",") if v]
    if unknown := set(values) - set(names):
      choices = f"choose from {sorted(names)}"
      parser.error(f"--{argument}: unknown {sorted(unknown)}; {choices}")
    setattr(args, argument, values)


def writable_file(file: pathlib.Path, flag: str) -> pathlib.Path:
  """Refuses, before anything runs, a file that cannot be written.

  Args:
    file: may exist.
    flag: the flag that named it, such as --json.

  Raises:
    UserError: it is a directory or a device, or its directory is missing, is a file, or
      may not be written to.
  """
  if file.is_dir():
    raise UserError(f"{flag}={file} is a directory. Give a file, such as one in it.")
  if file.exists() and (what := files.kind(file.stat().st_mode)):
    raise UserError(f"{flag}={file} is {what}. Give a file.")
  if not file.parent.is_dir():
    missing = "is a file" if file.parent.exists() else "does not exist. Make it first"
    raise UserError(f"{flag}={file}: the directory {file.parent} {missing}.")
  try:
    # A file is replaced by a new one in the same directory.
    with tempfile.TemporaryFile(dir=file.parent):
      pass
  except OSError as error:
    raise UserError(
      f"{flag}={file} cannot be written ({error.strerror}). Give another file."
    ) from error
  return file


def writable(directory: pathlib.Path, flag: str = "--out") -> pathlib.Path:
  """Refuses, before anything runs, an --out that cannot be made or written.

  Nothing is left behind: a missing directory is tried in its first existing parent.

  Args:
    directory: need not exist.
    flag: the flag that names it, or a file in it.

  Raises:
    UserError: it is a file, is below one, or may not be written to.
  """
  try:
    there = directory
    while not there.exists() and there != there.parent:
      there = there.parent
    if not there.is_dir():
      raise UserError(f"{flag}={directory}: {there} is a file. Give another directory.")
    with tempfile.TemporaryDirectory(dir=there):
      pass
  except OSError as error:
    raise UserError(
      f"{flag}={directory} cannot be written ({error.strerror}). Give another directory."
    ) from error
  return directory
