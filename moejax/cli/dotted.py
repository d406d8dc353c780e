"""Flags that are named after a config field: `--PREFIX.SECTION.FIELD=VALUE`.

Every program with a config takes `--config.`; a program may define more prefixes, such as
`sweep`, and parses their values itself. absl needs fixed flag names, so these words are
removed from the command line before absl parses it.
"""

import dataclasses
from collections.abc import Collection

from moejax.config import text as config_text
from moejax.errors import ConfigError

CONFIG = "config"

_prefixes: dict[str, str] = {}
"""Additional prefixes, and what each does, for --help."""
_without: dict[str, frozenset[str]] = {}
"""Fields that an additional prefix does not take, so they are never suggested for it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
  """One flag of the command line."""

  prefix: str
  """Prefix, such as `config`."""
  name: str
  """Dotted name of an existing field or, unchecked, of an option of a router."""
  text: str


def define_prefix(prefix: str, text: str, without: Collection[str] = ()) -> None:
  """Lets the program take `--PREFIX.SECTION.FIELD=TEXT`; see `flags.given`.

  Args:
    prefix: without a dot.
    text: what such a flag does, for --help.
    without: fields not to suggest for a misspelt one, since the program rejects them.
  """
  _prefixes[prefix] = text
  _without[prefix] = frozenset(without)


def prefixes() -> dict[str, str]:
  """Returns the additional prefixes that were defined, each with its text."""
  return dict(_prefixes)


def forget_prefixes() -> None:
  """Undoes every `define_prefix`, for tests."""
  _prefixes.clear()
  _without.clear()


def split(argv: list[str]) -> tuple[list[str], list[Given]]:
  """Splits `--config.a.b=v`, `--config.a.b v` and `--[no]config.a.flag` off argv.

  Flags of other prefixes need a value: `--sweep.a.b=v` or `--sweep.a.b v`.

  Returns:
    The other words, and the flags in command-line order.

  Raises:
    ConfigError: no such field (the message names the nearest flag), or no value.
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
        f"--{prefix}.workdir: a run's directory is not a setting. Leave it out: each run "
        "has its own directory below --workdir."
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
  """Returns a flag's prefix (empty if none), dotted name, and whether it has `no`."""
  if not word.startswith("-"):
    return "", word, False
  plain = word.lstrip("-")
  for prefix in known:
    for start in (f"{prefix}.", f"no{prefix}."):
      if plain.startswith(start):
        return prefix, plain.removeprefix(start), start != f"{prefix}."
  return "", word, False
