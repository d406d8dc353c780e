"""A `Config` as text and back: fields by dotted name, JSON, migrations, differences.

A dotted name is a field's path without the flag prefix, such as
`moe.num_experts`; the flag is `--config.moe.num_experts`.
"""

import copy
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from moejax.config import SCHEMA_VERSION, Config
from moejax.errors import ConfigError, did_you_mean

Migration = Callable[[dict[str, Any]], dict[str, Any]]

MIGRATIONS: dict[int, Migration] = {}
"""Version n to a function that turns a dict of version n into one of n + 1.

A field that is only added needs none: absent fields take the default that
`config.py` gives them, which therefore must mean "as before".
"""


@functools.cache
def field_types() -> Mapping[str, tuple[type, bool]]:
  """Every leaf's dotted name, with its type and whether None is allowed."""
  return types.MappingProxyType(dict(_leaves(Config, "")))


def _leaves(cls: Any, prefix: str):
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    hint = hints[field.name]
    if dataclasses.is_dataclass(hint):
      yield from _leaves(hint, f"{prefix}{field.name}.")
      continue
    members = typing.get_args(hint) or (hint,)
    plain = [m for m in members if m is not types.NoneType]
    yield prefix + field.name, (plain[0], len(plain) < len(members))


def check_name(dotted: str) -> None:
  """Raises ConfigError, with the nearest valid name, unless `dotted` is a field."""
  known = field_types()
  if dotted in known:
    return
  under = [name for name in known if name.startswith(dotted + ".")]
  if under:
    remedy = f"It is a group of fields; set one, for example --config.{under[0]}."
  else:
    remedy = did_you_mean("--config." + dotted, _flags_near(dotted, known))
  raise ConfigError(f"--config.{dotted}: there is no such field. {remedy}")


def _flags_near(dotted: str, known: Mapping[str, Any]) -> list[str]:
  """Flags to suggest: those of the section if it is right, else all of them."""
  section, _, leaf = dotted.rpartition(".")
  siblings = [n for n in known if n.rpartition(".")[0] == section]
  # The right leaf in the wrong section is nearer than any similar sibling.
  namesakes = [n for n in known if n.rpartition(".")[2] == leaf]
  return ["--config." + n for n in namesakes or siblings or known]


def get_field(config: Config, dotted: str) -> Any:
  """The value of a field by its dotted name."""
  check_name(dotted)
  return functools.reduce(getattr, dotted.split("."), config)


def set_field(config: Config, dotted: str, value: Any) -> None:
  """Sets a field in place, if `value` has the field's type.

  An int is taken where a float is declared, as Python itself does.

  Raises:
    ConfigError: no such field, or a value of another type.
  """
  check_name(dotted)
  kind, optional = field_types()[dotted]
  if kind is float and type(value) is int:
    # Of an int beyond all floats the range check makes an error.
    if abs(value) < 2**1000:
      value = float(value)
    else:
      value = math.inf if value > 0 else -math.inf
  if not (type(value) is kind or (optional and value is None)):
    raise ConfigError(f"--config.{dotted}={value!r}: {expected(dotted)}.")
  *section, leaf = dotted.split(".")
  setattr(functools.reduce(getattr, section, config), leaf, value)


def expected(dotted: str) -> str:
  """What a field takes, in words."""
  words = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
  }
  kind, optional = field_types()[dotted]
  return f"expected {words[kind]}" + (" or none" if optional else "")


def parse_value(dotted: str, text: str) -> Any:
  """A field's value from what stands on the command line.

  Raises:
    ConfigError: no such field, or the text is no value of its type.
  """
  check_name(dotted)
  kind, optional = field_types()[dotted]
  word = text.strip().lower()
  if optional and word == "none":
    return None
  try:
    if kind is bool:
      return {"true": True, "1": True, "false": False, "0": False}[word]
    return text if kind is str else kind(word)
  except (ValueError, KeyError):
    raise ConfigError(f"--config.{dotted}={text}: {expected(dotted)}.") from None


def to_dict(config: Config) -> dict[str, Any]:
  """Nested plain dicts, ready for JSON."""
  return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
  """The inverse of `to_dict`, for this and every earlier schema version.

  Fields the dict lacks take their defaults, which is what they meant before
  they existed.

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
      f"the config has schema_version={version!r}, and this moejax reads 1 to "
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


def difference(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
  """The fields in which two configs differ: (dotted name, old value, new value)."""
  pairs = ((name, get_field(old, name), get_field(new, name)) for name in field_types())
  return [(name, a, b) for name, a, b in pairs if a != b]


def dump(config: Config) -> str:
  """One `name = value` line per field, sorted: what reviews and goldens compare."""
  lines = (f"{name} = {get_field(config, name)!r}\n" for name in sorted(field_types()))
  return "".join(lines)
