"""Flags that are named after a config field: `--PREFIX.SECTION.FIELD=VALUE`.

Every program with a config takes `--config.`; a program may define further prefixes,
such as `sweep`, whose texts it parses itself. absl knows flags by fixed names, so these
words are taken off the command line before absl sees it.
"""

import dataclasses
from collections.abc import Collection

from moejax.config import text as config_text
from moejax.errors import ConfigError

CONFIG = "config"

_prefixes: dict[str, str] = {}
"""Further prefixes, and what each does, for --help."""
_without: dict[str, frozenset[str]] = {}
"""Fields that a further prefix does not take, and that are never suggested for it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
  """One flag of the command line."""

  prefix: str
  """Such as `config`."""
  name: str
  """Dotted name of an existing field or, unchecked, of an option of a router."""
  text: str


def define_prefix(prefix: str, text: str, without: Collection[str] = ()) -> None:
  """Lets the program take `--PREFIX.SECTION.FIELD=TEXT`; see `flags.given`.

  Args:
    prefix: without a dot.
    text: what such a flag does, for --help.
    without: fields that are not suggested for a misspelt one; the program rejects them.
  """
  _prefixes[prefix] = text
  _without[prefix] = frozenset(without)


def prefixes() -> dict[str, str]:
  """Returns the further prefixes that were defined, each with its text."""
  return dict(_prefixes)


def forget_prefixes() -> None:
  """Undoes every `define_prefix`, for tests."""
  _prefixes.clear()
  _without.clear()


def split(argv: list[str]) -> tuple[list[str], list[Given]]:
  """Splits `--config.a.b=v`, `--config.a.b v` and `--[no]config.a.flag` off argv.

  Flags of other prefixes need a value: `--sweep.a.b=v` or `--sweep.a.b v`.

  Returns:
    The other words, and the flags in the order of the line.

  Raises:
    ConfigError: no such field (names the nearest flag), or no value.
  """
  rest, found = [], []
  words = iter(argv)
  for word in words:
    name, has_value, value = word.partition("=")
    prefix, dotted, negated = _take_apart(name, (CONFIG, *_prefixes))
    if not prefix:
      rest.append(word)
      continue
    if prefix != CONFIG and dotted == "workdir":
      raise ConfigError(
        f"--{prefix}.workdir: where runs lie is no setting of them. Leave it out: each "
        "has a directory of its own below --workdir."
      )
    config_text.check_name(dotted, f"--{prefix}.", _without.get(prefix, ()))
    kind = config_text.field_types().get(dotted, (str, False))[0]
    is_switch = kind is bool and prefix == CONFIG
    if negated and (has_value or not is_switch):
      raise ConfigError(f"{word}: write --{prefix}.{dotted}=VALUE.")
    if not has_value:
      value = str(not negated) if is_switch else next(words, None)
    if value is None:
      field = not config_text.is_router_option(dotted)
      wanted = config_text.expected(dotted) if field else f"write {word}=VALUE"
      raise ConfigError(f"{word}: no value given; {wanted}.")
    found.append(Given(prefix=prefix, name=dotted, text=value))
  return rest, found


def _take_apart(word: str, known: Collection[str]) -> tuple[str, str, bool]:
  """Returns the prefix of a flag (empty if none), its dotted name, and if it has `no`."""
  if not word.startswith("-"):
    return "", word, False
  plain = word.lstrip("-")
  for prefix in known:
    for start in (f"{prefix}.", f"no{prefix}."):
      if plain.startswith(start):
        return prefix, plain.removeprefix(start), start != f"{prefix}."
  return "", word, False
