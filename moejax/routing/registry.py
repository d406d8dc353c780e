"""The registry of routers, by their names on the command line.

A router's file is imported on first use, so listing names does not import jax.
"""

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from moejax.errors import ConfigError, did_you_mean
from moejax.options import Option, options_of

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


class _Routers(MutableMapping[str, "type[Router]"]):
  """Router classes by name; add your own by assignment."""

  def __init__(self, shipped: Mapping[str, str]):
    self._found: dict[str, str | type[Router]] = dict(shipped)

  def __getitem__(self, name: str) -> "type[Router]":
    found = self._found[name]
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
    return iter(self._found)

  def __len__(self) -> int:
    return len(self._found)

  def __contains__(self, name: object) -> bool:
    return name in self._found


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
      f"--config.moe.router={name} is unknown. {did_you_mean(name, ROUTERS)}"
    )
  known = options_by_name(name)
  for option, value in options.items():
    flag = f"--config.moe.{name}.{option}"
    if option not in known:
      remedy = did_you_mean(option, known) if known else f"{name} has no options."
      raise ConfigError(f"{flag}: there is no such option. {remedy}")
    known[option].check(flag, value)
  return ROUTERS[name](**options)
