"""The registry of routers, by their names on the command line.

A router's file is imported on first use, so listing names does not import jax. Your own
router is registered once its file has been imported, by `--config` or through the
environment variable MOEJAX_ROUTERS. Evaluating its runs requires the variable.
"""

import importlib
import importlib.util
import inspect
import os
import pathlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from moejax.errors import ConfigError, did_you_mean
from moejax.options import Option, options_of
from moejax.user_file import execute

if TYPE_CHECKING:
  from moejax.routing.router import Router

_SHIPPED = {
  "switch": "token_choice.Switch",
  "top2": "token_choice.Top2",
  "top_k": "token_choice.TopK",
  "noisy_top_k": "noisy.NoisyTopK",
  "expert_choice": "expert_choice.ExpertChoice",
  "sigmoid_bias": "bias.SigmoidBias",
  "quantile_bias": "bias.QuantileBias",
  "quantile_balancing": "quantile_balancing.QuantileBalancing",
  "group_limited": "expert_groups.GroupLimited",
  "hash": "hashing.Hash",
  "base": "assignment.Base",
  "soft": "soft.Soft",
  "random": "baselines.Random",
  "forced_balance": "baselines.ForcedBalance",
  "dense": "baselines.Dense",
}
"""File and class below moejax.routing, in the order of --list=routers."""


ENV = "MOEJAX_ROUTERS"
"""Environment variable: Python files that add routers, separated as in PATH."""

OF_YOUR_OWN = f"A router of your own needs {ENV}=FILE, the Python file that adds it."
"""Remedy for an unknown router, for error messages."""


class _Routers(MutableMapping[str, "type[Router]"]):
  """Router classes by name; add your own by assignment."""

  def __init__(self, shipped: Mapping[str, str]):
    self._found: dict[str, str | type[Router]] = dict(shipped)
    self._imported: set[str] = set()

  def _known(self) -> "dict[str, str | type[Router]]":
    """Returns all routers, after those of the files in MOEJAX_ROUTERS."""
    for file in os.environ.get(ENV, "").split(os.pathsep):
      if file and file not in self._imported:
        self._imported.add(file)  # First, since the file itself looks up routers.
        _import(file)
    return self._found

  def __getitem__(self, name: str) -> "type[Router]":
    found = self._known()[name]
    if isinstance(found, str):
      file, _, cls = found.partition(".")
      module = importlib.import_module(f"moejax.routing.{file}")
      found = self._found[name] = vars(module)[cls]
    return found

  def __setitem__(self, name: str, router: "type[Router]") -> None:
    self._found[name] = router

  def __delitem__(self, name: str) -> None:
    del self._found[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._known())

  def __len__(self) -> int:
    return len(self._known())

  def __contains__(self, name: object) -> bool:
    return name in self._known()

  def files(self) -> list[str]:
    """Returns the files of the classes that were added, for MOEJAX_ROUTERS."""
    return sorted(set(self.added().values()))

  def added(self) -> dict[str, str]:
    """Returns the file of each router that was added, by the router's name."""
    known = self._known().items()
    classes = {name: cls for name, cls in known if not isinstance(cls, str)}
    files = {n: pathlib.Path(inspect.getfile(c)).resolve() for n, c in classes.items()}
    own = pathlib.Path(__file__).parent
    return {name: str(file) for name, file in files.items() if file.parent != own}


def _import(file: str) -> None:
  """Runs a file that adds routers.

  Raises:
    ConfigError: the file is missing or raises an error.
  """
  name = f"moejax_routers_{pathlib.Path(file).stem}"
  spec = importlib.util.spec_from_file_location(name, file)
  if spec is None or spec.loader is None or not pathlib.Path(file).is_file():
    raise ConfigError(f"{ENV}={file}: no such Python file. Correct or unset it.")
  module = importlib.util.module_from_spec(spec)
  try:
    execute(module)
  except Exception as error:
    words = " ".join(str(error).split())
    raise ConfigError(f"{ENV}={file} fails: {type(error).__name__}: {words}") from error


ROUTERS = _Routers(_SHIPPED)


def options_by_name(name: str) -> Mapping[str, Option]:
  """Returns the options of a router by name."""
  return options_of(ROUTERS[name])


def readers(field: str) -> list[str]:
  """Returns the routers that read a field of `MoEConfig`."""
  return [name for name, router in ROUTERS.items() if router.reads_field(field)]


def make(name: str, options: Mapping[str, Any]) -> "Router":
  """Returns a router with the given options; the others have their defaults.

  Raises:
    ConfigError: unknown router or option, or an invalid value.
  """
  if name not in ROUTERS:
    raise ConfigError(
      f"--config.moe.router={name} is unknown. {did_you_mean(name, ROUTERS)} "
      f"{OF_YOUR_OWN}"
    )
  known = options_by_name(name)
  if not isinstance(options, Mapping):
    raise ConfigError(
      f"--config.moe.options: {name!r}: {options!r} is not a dict of options. In Python, "
      f'call config.moe.use_router("{name}", OPTION=VALUE).'
    )
  for option, value in options.items():
    flag = f"--config.moe.{name}.{option}"
    if option not in known:
      remedy = did_you_mean(option, known) if known else f"{name} has no options."
      raise ConfigError(f"{flag}: there is no such option. {remedy}")
    known[option].check(flag, value)
  return ROUTERS[name](**options)
