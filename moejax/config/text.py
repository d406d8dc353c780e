"""Text form of a `Config`: fields by dotted name, JSON, migrations, differences.

A dotted name is a field's path without the flag prefix, such as
`moe.num_experts`; the flag is `--config.moe.num_experts`.
"""

import copy
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from moejax.config.schema import SCHEMA_VERSION, Config
from moejax.errors import ConfigError, did_you_mean, nearest
from moejax.options import WORDS, Option, parse_plain, show
from moejax.routing.registry import OF_YOUR_OWN, ROUTERS, options_by_name

Migration = Callable[[dict[str, Any]], dict[str, Any]]

FLAG = "--config."
"""Prefix that makes a dotted name the flag that sets the field."""

_MOVED_TO_ROUTERS = {
  "second_policy": ("second_policy", "top2"),
  "num_expert_groups": (
    "num_expert_groups",
    "group_limited sigmoid_bias quantile_bias",
  ),
  "num_selected_groups": (
    "num_selected_groups",
    "group_limited sigmoid_bias quantile_bias",
  ),
  "group_best": ("group_best", "group_limited sigmoid_bias quantile_bias"),
  "bias_update_rate": ("bias_update_rate", "sigmoid_bias"),
  "quantile_rate": ("quantile_rate", "quantile_bias"),
  "noise": ("noise", "noisy_top_k"),
  "noise_std": ("noise_std", "noisy_top_k"),
  "hash_table": ("spread", "hash"),
  "sinkhorn_iterations": ("sinkhorn_iterations", "base"),
  "sinkhorn_tolerance": ("sinkhorn_tolerance", "base"),
  "importance_weight": ("importance_weight", "noisy_top_k"),
  "load_weight": ("load_weight", "noisy_top_k"),
  "device_weight": ("device_weight", "group_limited"),
  "communication_weight": ("communication_weight", "group_limited"),
}
"""Schema 1 to 2: a field of `moe`, its new name, and the routers that read it."""


def _options_to_routers(values: dict[str, Any]) -> dict[str, Any]:
  """Migrates schema 1 to 2; drops options that the chosen router did not read."""
  moe = values.get("moe", {})
  if not isinstance(moe, Mapping):
    raise ConfigError(f"the config's moe is {moe!r}, but must be a group of fields.")
  moe = dict(moe)
  router, options = moe.get("router", "switch"), {}
  for old, (new, routers) in _MOVED_TO_ROUTERS.items():
    if old in moe:
      value = moe.pop(old)
      if router in routers.split():
        options[new] = value
  if options:
    moe[router] = options
  return {**values, "moe": moe}


MIGRATIONS: dict[int, Migration] = {1: _options_to_routers}
"""Maps version n to a function that converts a dict of version n to version n + 1.

A new field needs no migration: absent fields take their default in
`config/schema.py`, which must therefore keep the earlier behaviour.
"""


@functools.cache
def field_types() -> Mapping[str, tuple[type, bool]]:
  """Maps every leaf's dotted name to its type and whether None is allowed."""
  return types.MappingProxyType(dict(_leaves(Config, "")))


def _leaves(cls: Any, prefix: str):
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    hint = hints[field.name]
    if typing.get_origin(hint) is dict:
      continue  # Router options, declared by their classes.
    if dataclasses.is_dataclass(hint):
      yield from _leaves(hint, f"{prefix}{field.name}.")
      continue
    members = typing.get_args(hint) or (hint,)
    plain = [m for m in members if m is not types.NoneType]
    yield prefix + field.name, (plain[0], len(plain) < len(members))


def is_router_option(dotted: str) -> bool:
  """Returns whether a name is `moe.ROUTER.OPTION` with an existing router."""
  section, _, rest = dotted.partition(".")
  router, dot, _ = rest.partition(".")
  return section == "moe" and bool(dot) and router in ROUTERS


def _option(dotted: str, prefix: str = FLAG) -> Option:
  """Returns a router's option; imports the router's module.

  Raises:
    ConfigError: the router has no such option.
  """
  _, router, name = dotted.split(".", 2)
  known = options_by_name(router)
  if name not in known:
    near = [f"{prefix}moe.{router}.{option}" for option in known]
    remedy = did_you_mean(prefix + dotted, near) if near else "It has none."
    raise ConfigError(f"{prefix}{dotted}: there is no such option. {remedy}")
  return known[name]


def check_name(dotted: str, prefix: str = FLAG, without: Collection[str] = ()) -> None:
  """Raises ConfigError, with the nearest valid name, unless `dotted` is a field.

  For a router option only the router is checked, so that jax is not imported.

  Args:
    dotted: the name to check.
    prefix: of the flag by which it was given.
    without: fields that are not suggested.
  """
  known = field_types()
  if dotted in known or is_router_option(dotted):
    return
  known = {name: kind for name, kind in known.items() if name not in without}
  under = [name for name in known if name.startswith(dotted + ".")]
  section, _, leaf = dotted.rpartition(".")
  if section == "moe" and leaf in _MOVED_TO_ROUTERS:
    new, routers = _MOVED_TO_ROUTERS[leaf]
    flags = [f"{prefix}moe.{router}.{new}" for router in routers.split()]
    remedy = f"It is an option of a router: {' or '.join(flags)}."
  elif section == "moe" and leaf in ROUTERS:
    remedy = "It is a group of options; --list=routers shows them."
  elif under:
    remedy = f"It is a group of fields; set one, for example {prefix}{under[0]}."
  elif not section and not any(name.endswith(f".{leaf}") for name in known):
    remedy = f"Write SECTION.FIELD, such as {prefix}moe.num_experts."
  elif section.startswith("moe.") and section[4:] not in ROUTERS:
    near = nearest(section[4:], ROUTERS)
    remedy = f"Did you mean {prefix}moe.{near}.{leaf}? " if near else ""
    remedy = f"There is no router {section[4:]}. {remedy}{OF_YOUR_OWN}"
  else:
    remedy = did_you_mean(prefix + dotted, _flags_near(dotted, known, prefix))
  raise ConfigError(f"{prefix}{dotted}: there is no such field. {remedy}")


def _flags_near(dotted: str, known: Mapping[str, Any], prefix: str) -> list[str]:
  """Returns flags to suggest: the leaf elsewhere, else the section, else all."""
  section, _, leaf = dotted.rpartition(".")
  if section.startswith("moe."):  # The misspelt part is the router.
    return [f"{prefix}moe.{router}.{leaf}" for router in ROUTERS]
  siblings = [n for n in known if n.rpartition(".")[0] == section]
  # The right leaf in the wrong section is closer than any similar sibling.
  namesakes = [n for n in known if n.rpartition(".")[2] == leaf]
  return [prefix + n for n in namesakes or siblings or known]


def get_field(config: Config, dotted: str) -> Any:
  """Returns the value of a field by its dotted name."""
  check_name(dotted)
  if is_router_option(dotted):
    _, router, name = dotted.split(".", 2)
    return config.moe.options.get(router, {}).get(name, _option(dotted).default)
  return functools.reduce(getattr, dotted.split("."), config)


def named(config: Config, *names: str) -> str:
  """Names fields and their values in errors: `--config.a.b=1 with --config.c.d=2`."""
  return " with ".join(f"--config.{n}={show(get_field(config, n))}" for n in names)


def set_field(config: Config, dotted: str, value: Any) -> None:
  """Sets a field in place, if `value` has the field's type.

  An int is accepted where a float is declared, as in Python.

  Raises:
    ConfigError: no such field, a value of another type, or an invalid router option.
  """
  check_name(dotted)
  if is_router_option(dotted):
    _, router, name = dotted.split(".", 2)
    option = _option(dotted)
    value = _as_float(value) if option.kind is float else value
    option.check(f"--config.{dotted}", value)
    options = {**config.moe.options.get(router, {}), name: value}
    if value == option.default:  # So that equivalent configs compare equal.
      del options[name]
    others = {r: given for r, given in config.moe.options.items() if r != router}
    config.moe.options = others | ({router: options} if options else {})
    return
  kind, optional = field_types()[dotted]
  value = _as_float(value) if kind is float else value
  if not (type(value) is kind or (optional and value is None)):
    raise ConfigError(f"--config.{dotted}={value!r}: {expected(dotted)}.")
  *section, leaf = dotted.split(".")
  setattr(functools.reduce(getattr, section, config), leaf, value)


def _as_float(value: Any) -> Any:
  """Converts an int to float; too large becomes inf, left to the range check."""
  if type(value) is not int:
    return value
  if abs(value) < 2**1000:
    return float(value)
  return math.inf if value > 0 else -math.inf


def expected(dotted: str) -> str:
  """Returns the expected type of a field, in words."""
  kind, optional = field_types()[dotted]
  return f"expected {WORDS[kind]}" + (" or none" if optional else "")


def parse_value(dotted: str, text: str, prefix: str = FLAG) -> Any:
  """Parses a field's value from the command line.

  Args:
    dotted: name of the field.
    text: its value.
    prefix: of the flag by which it was given, for errors.

  Raises:
    ConfigError: no such field, or the text is not a value of its type.
  """
  check_name(dotted, prefix)
  if is_router_option(dotted):
    return _option(dotted, prefix).parse(prefix + dotted, text)
  kind, optional = field_types()[dotted]
  if optional and text.strip().lower() == "none":
    return None
  try:
    return parse_plain(kind, text)
  except ValueError:
    raise ConfigError(f"{prefix}{dotted}={text}: {expected(dotted)}.") from None


def to_dict(config: Config) -> dict[str, Any]:
  """Converts to nested plain dicts for JSON, with every option of the chosen router."""
  values = dataclasses.asdict(config)
  del values["moe"]["options"]
  options = router_options(config)
  if options:
    values["moe"][config.moe.router] = options
  return values


def router_options(config: Config) -> dict[str, Any]:
  """Returns every option of the chosen router, set or not."""
  known = options_by_name(config.moe.router)
  return {name: option.default for name, option in known.items()} | (
    config.moe.router_options
  )


def from_dict(values: Mapping[str, Any]) -> Config:
  """Inverts `to_dict`, for this and every earlier schema version.

  Missing fields take their defaults, which keep the behaviour from before they
  existed.

  Raises:
    ConfigError: an unknown field, a value of another type, or a newer schema.
  """
  values = _migrated(copy.deepcopy(dict(values)))
  config = Config()
  for dotted, value in _flatten(values):
    set_field(config, dotted, value)
  return config


def _migrated(values: dict[str, Any]) -> dict[str, Any]:
  version = values.get("schema_version", SCHEMA_VERSION)
  if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
    raise ConfigError(
      f"the config has schema_version={version!r}, but this moejax reads 1 to "
      f"{SCHEMA_VERSION}. Use the version of moejax that wrote it, or a later one."
    )
  while version < SCHEMA_VERSION:
    values = MIGRATIONS[version](values)
    version += 1
  return {**values, "schema_version": SCHEMA_VERSION}


def _flatten(values: Mapping[str, Any], prefix: str = ""):
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def leaves(config: Config) -> dict[str, Any]:
  """Returns every field, and every option of the chosen router, by dotted name."""
  router = config.moe.router
  options = router_options(config).items()
  return {name: get_field(config, name) for name in field_types()} | {
    f"moe.{router}.{name}": value for name, value in options
  }


def difference(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
  """Returns the fields that differ: (dotted name, old value, new value).

  Options of a router that only one of the configs uses are not compared.
  """
  before, now = leaves(old), leaves(new)
  same = [name for name in now if name in before]
  return [(name, before[name], now[name]) for name in same if before[name] != now[name]]


def dump(config: Config) -> str:
  """Returns one `name = value` line per field, sorted, for reviews and golden files."""
  return "".join(
    f"{name} = {value!r}\n" for name, value in sorted(leaves(config).items())
  )
