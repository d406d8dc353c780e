"""The command line: one config, its overrides, and errors without tracebacks.

A program defines its own absl flags, calls `define_config()`, and ends with
`cli.run(main)`. `--config.SECTION.FIELD=VALUE` overrides one field of the config
and may appear anywhere on the line; a program may also apply the overrides to another
config, such as the one stored in a run's directory.

Nothing here imports jax, so a program that imports heavy modules inside `main` rejects a
misspelt flag in a fraction of a second.
"""

import argparse
import copy
import functools
import logging
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from absl import app, command_name, flags
from absl import logging as absl_logging

from moejax import files
from moejax.cli import dotted as dotted_flags
from moejax.cli import guard, help, listing, python_file
from moejax.config import Config
from moejax.config import text as config_text
from moejax.config.check import refuse_unread, validate, validate_fields
from moejax.errors import ConfigError, UserError, did_you_mean, nearest, program
from moejax.options import WORDS
from moejax.routing.registry import ROUTERS
from moejax.storage import errors as storage_errors
from moejax.storage.paths import RunPath, is_url, refuse_url, run_path

# Flags defined by `define_config` belong to the program that called it.
flags.disclaim_key_flags()

DEFAULT_CONFIG = "configs/default.py"
_HELP = ("help", "h", "helpshort", "helpfull")
_NO_NUMBER = {"invalid literal for int()": int, "could not convert string": float}
"""Python's messages for a flag that is not a number."""

_overrides: dict[str, Any] = {}
"""Dotted name to value, from the last parsed command line."""

_given: list[dotted_flags.Given] = []
"""Flags of other prefixes on that command line, in order."""


def define_config(default: str | None = DEFAULT_CONFIG, *, workdir: bool = True) -> None:
  """Defines --config, --workdir and --list, unless already defined.

  Args:
    default: the default config file; None if the program passes its own config to
      `get_config`.
    workdir: whether the program has a --workdir.
  """
  define = {
    "config": lambda name: flags.DEFINE_string(
      name, default, "Config file: a path, or a shipped name."
    ),
    "workdir": lambda name: flags.DEFINE_string(name, None, "Directory of the run."),
    "list": lambda name: flags.DEFINE_enum(
      name, None, listing.LISTS, "Print the available choices, and exit."
    ),
  }
  # Tests import several programs into one process, where redefining is an error.
  for name, make in define.items():
    if name not in flags.FLAGS and (workdir or name != "workdir"):
      make(name)
  flags.FLAGS.set_default("config", default)


def get_config(
  base: Config | None = None, announce: Callable[[], None] | None = None
) -> Config:
  """Returns the validated config of this command line; every call returns a new one.

  Args:
    base: config to which the overrides are applied, unchanged; None reads --config.
    announce: called after the fast checks, before the slow import of jax.

  Raises:
    ConfigError: the file cannot be used, or the result fails `validate`.
  """
  from_file = base is None
  config = _laid_over(base)
  validate_fields(config)
  if announce is not None:
    announce()
  _set_options(config)
  validate(config)
  refuse_unread(config, list(_overrides) + (given_by(config) if from_file else []))
  return config


def get_unchecked_config(base: Config | None = None) -> Config:
  """Like `get_config`, for a config that need not be valid until it is changed further.

  Raises:
    ConfigError: the file cannot be used, or an override is not of its field's type.
  """
  config = _laid_over(base)
  _set_options(config)
  return config


def _laid_over(base: Config | None) -> Config:
  """Returns a copy of `base`, or the config of --config, with overridden fields."""
  if base is None:
    base = load_config(flags.FLAGS["config"].value or DEFAULT_CONFIG)
  config = copy.deepcopy(base)
  for dotted, value in _overrides.items():
    if not config_text.is_router_option(dotted):
      config_text.set_field(config, dotted, value)
  if config.moe.router != base.moe.router:
    config.moe.options.pop(base.moe.router, None)  # Those of the router given up.
  return config


def _set_options(config: Config) -> None:
  """Sets the overridden options of routers, whose modules import jax."""
  for dotted, text in _overrides.items():
    if config_text.is_router_option(dotted):
      config_text.set_field(config, dotted, config_text.parse_value(dotted, text))


def given_by(config: Config) -> list[str]:
  """Returns the dotted names of the fields set by a config file."""
  changed = [name for name, _, _ in config_text.difference(Config(), config)]
  options = config.moe.options.items()
  return changed + [f"moe.{router}.{name}" for router, given in options for name in given]


def run_directory() -> pathlib.Path:
  """Returns --workdir of a program that reads a run on disk; see `run_location`."""
  found = run_location()
  if not isinstance(found, pathlib.Path):
    refuse_url(found, "--workdir")
  return found


def run_location() -> RunPath:
  """Returns --workdir of a program that reads a run, possibly in a bucket.

  Raises:
    UserError: it is missing or not a directory, or the bucket refuses.
  """
  given = flags.FLAGS["workdir"].value
  train = program("train", "experiments.train")
  remedy = f"Give the directory that {train} was given as --workdir."
  if not given:
    raise UserError(f"--workdir=DIR is missing. {remedy}")
  path = run_path(given)
  storage_errors.reach(path)
  if not path.is_dir():
    what = "is a file" if path.exists() else "does not exist"
    raise UserError(f"--workdir={given} {what}. {remedy}")
  return path


def overrides() -> dict[str, Any]:
  """Returns the overridden fields of this command line: dotted name to value."""
  return dict(_overrides)


def spelled(value: Any) -> str:
  """Returns a field's value as it is written on the command line."""
  return "none" if value is None else str(value)


def given() -> list[dotted_flags.Given]:
  """Returns this command line's flags of the prefixes that the program defined."""
  return list(_given)


def config_flags() -> str:
  """Returns flags that pass the config of this command line to another program."""
  file = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
  words = [f"--config={file or DEFAULT_CONFIG}"]
  words += [f"--config.{name}={value}" for name, value in _overrides.items()]
  return shlex.join(words)


def load_config(path: str) -> Config:
  """Runs a config file and returns what its `get_config()` returns, unchecked.

  Args:
    path: a file, or the name of a shipped config (`default`, `configs/default.py`); a
      .json file is the stored config of a run.

  Raises:
    ConfigError: the file is missing, fails, or does not return a `Config`.
  """
  flag, file = f"--config={path}", _find_config(path)
  if file.suffix == ".json":
    try:
      values = files.read_json(file)
      if "schema_version" not in values:
        raise ValueError("it has no schema_version")
      return config_text.from_dict(values)
    except (OSError, ValueError, TypeError, AttributeError) as e:
      raise ConfigError(
        f"{flag} cannot be read as a stored config ({e}). Give the config.json of a run; "
        f"{program('convert', 'experiments.convert')} makes a run of a published model."
      ) from e
  return python_file.load(flag, file, "get_config", Config, "configs/default.py")[0]


def _find_config(path: str) -> pathlib.Path:
  shipped = listing.shipped_configs()
  # An existing path takes precedence; a shipped name works from any directory.
  if pathlib.Path(path).is_file():
    return pathlib.Path(path)
  name = path.removeprefix("configs/").removesuffix(".py")
  if name in shipped:
    return shipped[name]
  what = "is a directory" if pathlib.Path(path).is_dir() else "no such file"
  raise ConfigError(
    f"--config={path}: {what}. {did_you_mean(name, shipped)} "
    "A path to a config file of your own works too."
  )


def run(main: Callable[[], int | None], buckets: Collection[str] = ()) -> None:
  """Parses the command line, calls `main` and exits with what it returns.

  Any `UserError`, including a mistake on the command line, becomes one line on stderr
  and the error's exit code (default 2).

  Args:
    main: the program.
    buckets: flags that may name a folder in a bucket; it is refused for other flags.
  """
  app.run(
    lambda _: guard.guarded(functools.partial(_main_or_list, main, buckets)),
    flags_parser=lambda argv: guard.guarded(
      functools.partial(parse, argv, main.__module__)
    ),
  )


_WRITTEN = frozenset(
  (
    *("output", "out", "json", "map", "hlo", "trace", "to_hf", "data_dir"),
    *("compilation_cache", "config.data.cache_dir"),
  )
)
"""Flags that name outputs of a program; the others name inputs."""


class Parser(argparse.ArgumentParser):
  """Parser for programs without a config, with the same error format as the others."""

  def __init__(self, description: str | None, **options: Any):
    super().__init__(
      description=description and help.as_called_here(description),
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
      **options,
    )

  def parse_args(self, *args: Any, **kwargs: Any) -> Any:
    """Parses as usual; refuses bucket URLs, except in the words of another command."""
    found = super().parse_args(*args, **kwargs)
    for name, value in vars(found).items():
      if is_url(value):
        refuse_url(value, f"--{name}", written=name in _WRITTEN)
    return found

  def error(self, message: str) -> NoReturn:
    print(f"error: {message.rstrip('.')}. --help lists all flags.", file=sys.stderr)
    sys.exit(UserError.exit_code)


class _OursOrWarning(logging.Filter):
  """Passes warnings of libraries, and all records of moejax."""

  _package = str(pathlib.Path(__file__).parents[1])

  def filter(self, record: logging.LogRecord) -> bool:
    ours = record.pathname.startswith(self._package)
    return ours or record.levelno >= logging.WARNING


def _main_or_list(main: Callable[[], int | None], buckets: Collection[str]) -> int | None:
  absl_logging.get_absl_handler().addFilter(_OursOrWarning())
  # absl names the process after argv[0]; Slurm loses processes with a space in the name.
  name = os.path.basename(sys.argv[0]).replace(" ", "-")
  command_name.set_kernel_process_name(name)
  what = flags.FLAGS["list"].value if "list" in flags.FLAGS else None
  if what:
    file = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    if file:
      load_config(file)  # It may add a router.
    print(listing.describe(what), end="")
    return None
  _refuse_buckets(buckets)
  return main()


def _refuse_buckets(allowed: Collection[str]) -> None:
  """Refuses bucket URLs in all flags and fields except those allowed."""
  given = {f"config.{name}": value for name, value in _overrides.items()}
  given |= flags.FLAGS.flag_values_dict()
  for name, value in given.items():
    # A prompt is text, which may contain a bucket's URL.
    if name not in (*allowed, "prompt") and is_url(value):
      written = name in _WRITTEN or (name == "workdir" and _makes_workdir())
      refuse_url(value, f"--{name}", written=written)


def _makes_workdir() -> bool:
  """Returns whether a sweep or an imported model is written to --workdir."""
  given = flags.FLAGS
  return "spec" in given or bool("from_hf" in given and given.from_hf)


def parse(argv: list[str], program: str = "__main__") -> list[str]:
  """Parses absl flags and config overrides, in any order; prints --help and exits.

  Args:
    argv: the command line, program name first.
    program: name of the module whose docstring and flags are shown by --help.

  Returns:
    Only the program name: no program takes positional arguments.

  Raises:
    UserError: an unknown flag or field (the message names the closest), or a bad value.
  """
  if any(a.lstrip("-") in _HELP and a.startswith("-") for a in argv[1:]):
    print(help.describe(argv[0], program))
    sys.exit(0)
  try:
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=True)
    _add_routers(argv)
    rest, found = dotted_flags.split(argv) if "config" in flags.FLAGS else (argv, [])
    # Stored at once, after the whole line is read: a later --config must not undo them.
    _overrides.clear()
    ours = [flag for flag in found if flag.prefix == dotted_flags.CONFIG]
    _overrides.update((flag.name, _parsed(flag.name, flag.text)) for flag in ours)
    _given[:] = [flag for flag in found if flag.prefix != dotted_flags.CONFIG]
    positional = flags.FLAGS(rest)
  except flags.UnrecognizedFlagError as error:
    raise UserError(_unknown_flag(error.flagname)) from None
  except flags.Error as error:
    raise UserError(_plain(str(error))) from None
  if len(positional) > 1:
    raise UserError(
      f"{positional[1]!r} is not a flag: every argument has the form --name=value."
    )
  return positional


def _plain(error: str) -> str:
  """Returns an absl error without the wording of Python's int() and float()."""
  flag, _, why = error.removeprefix("flag ").partition(": ")
  for start, kind in _NO_NUMBER.items():
    if why.startswith(start):
      return f"{flag}: expected {WORDS[kind]}."
  return error


def _add_routers(argv: list[str]) -> None:
  """Runs the config file if a flag sets an option of an unknown router.

  The config file may add that router; a misspelt router costs a run of the file.
  """
  options = [re.match(r"--\w+\.moe\.(\w+)\.", word) for word in argv]
  if all(not found or found[1] in ROUTERS for found in options):
    return
  for flag, following in zip(argv, [*argv[1:], ""], strict=True):
    name, has_value, value = flag.partition("=")
    file = pathlib.Path(value if has_value else following)
    if name in ("--config", "-config") and file.is_file():
      load_config(str(file))


def _parsed(dotted: str, text: str) -> Any:
  """Parses a field's value; leaves router options as text, parsed by `get_config`."""
  if config_text.is_router_option(dotted):
    return text
  return config_text.parse_value(dotted, text)


def _unknown_flag(name: str) -> str:
  fields = [] if "config" not in flags.FLAGS else list(config_text.field_types())
  # `--num_experts` or `--moe.num_experts`: an existing field without its prefix.
  for field in fields:
    if field == name or field.endswith("." + name):
      return f"--{name}: there is no such flag. Did you mean --config.{field}?"
  names = [n for n in flags.FLAGS if len(n) > 1]
  names += [f"{p}.{f}" for p in ("config", *dotted_flags.prefixes()) for f in fields]
  near = nearest(name, names)
  remedy = f"Did you mean --{near}?" if near else "--help lists all flags."
  return f"--{name}: there is no such flag. {remedy}"
