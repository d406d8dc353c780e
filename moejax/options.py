"""Options: dataclass fields that can be set by a flag.

An option is a dataclass field made by `option`, which declares its type, default, help
text and allowed values. A `Literal` type lists the allowed words.

Nothing here imports jax.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from moejax.errors import ConfigError, did_you_mean

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclasses.dataclass(frozen=True)
class Range:
  """An interval, with optionally open ends; the reasons are added to the error."""

  low: float = -math.inf
  high: float = math.inf
  why: str = ""
  """Reason for the lower end, or the meaning of a special value."""
  low_open: bool = False
  high_open: bool = False
  why_high: str = ""

  def __contains__(self, value: float) -> bool:
    # Compared without conversion: an int may be larger than any float.
    above = self.low < value if self.low_open else self.low <= value
    below = value < self.high if self.high_open else value <= self.high
    return value not in (math.inf, -math.inf) and above and below

  def __str__(self) -> str:
    """Returns, for example, "at least 1" or "above 0 and at most 1"."""
    low = "above" if self.low_open else "at least"
    high = "below" if self.high_open else "at most"
    words = [f"{low} {_plain(self.low)}"] if math.isfinite(self.low) else []
    words += [f"{high} {_plain(self.high)}"] if math.isfinite(self.high) else []
    return " and ".join(words) or "finite"

  def reason(self, value: float) -> str:
    """Returns why this value is refused; empty if no reason is declared."""
    return (self.why_high if value > self.high else "") or self.why


def _plain(number: float) -> str:
  return f"{number:,.0f}" if number == int(number) and number < 1e12 else f"{number:g}"


def weight(why: str = "0 is off") -> Range:
  """Returns the range of a loss weight."""
  return Range(0, 1e4, why, why_high="the loss would be nothing but this term")


def count(low: int, high: int, why_high: str, why: str = "") -> Range:
  """Returns the range of a count."""
  return Range(low, high, why, why_high=why_high)


def option(default: Any, text: str, allowed: Range | None = None) -> Any:
  """Returns a dataclass field that is an option.

  Args:
    default: value without a flag.
    text: what it does, for --list and the docs.
    allowed: range of a number.
  """
  return dataclasses.field(default=default, metadata={"text": text, "allowed": allowed})


@dataclasses.dataclass(frozen=True)
class Option:
  """One option of a class, as declared by its field."""

  kind: type
  default: Any
  text: str
  choices: tuple[str, ...]
  """Allowed words; empty if any text is allowed."""
  allowed: Range | None

  @property
  def expected(self) -> str:
    """The expected type, in words."""
    return f"expected {WORDS[self.kind]}"

  def parse(self, flag: str, text: str) -> Any:
    """Parses a value from the command line.

    Raises:
      ConfigError: the text is not a value of the option's type.
    """
    try:
      return parse_plain(self.kind, text)
    except ValueError:
      raise ConfigError(f"{flag}={text}: {self.expected}.") from None

  def check(self, flag: str, value: Any) -> None:
    """Rejects a value of another type, an unknown word, or a number out of range.

    Raises:
      ConfigError: names the flag, the value and what is allowed.
    """
    check_type(flag, value, self.kind, self.expected)
    if self.choices:
      check_choice(flag, value, self.choices)
    if self.allowed is not None:
      check_range(flag, value, self.allowed)


def check_type(flag: str, value: Any, kind: type, expected: str) -> None:
  """Rejects a value that is not of type `kind`; an int counts as a float.

  Raises:
    ConfigError: names the flag, the value and what is `expected`.
  """
  # bool is a subclass of int, but `True` for a number is a mistake.
  if type(value) is not kind and not (kind is float and type(value) is int):
    # From Python: "4" is not 4, nor is a number of numpy's.
    odd = type(value) is str or type(value).__module__ != "builtins"
    raise ConfigError(f"{flag}={repr(value) if odd else show(value)}: {expected}.")


def check_choice(flag: str, value: Any, choices: Collection[str]) -> None:
  """Rejects an unknown word.

  Raises:
    ConfigError: names the flag, the value and the nearest choice.
  """
  if value not in choices:
    raise ConfigError(f"{flag}={value} is unknown. {did_you_mean(str(value), choices)}")


def check_range(flag: str, value: Any, allowed: Range) -> None:
  """Rejects a number out of range.

  Raises:
    ConfigError: names the flag, the value, the range and its reason.
  """
  if value not in allowed:
    why = f" ({allowed.reason(value)})" if allowed.reason(value) else ""
    raise ConfigError(f"{flag}={show(value)} must be {allowed}{why}.")


def parse_plain(kind: type, text: str) -> Any:
  """Parses a bool, number or text from the command line.

  Raises:
    ValueError: the text is not of that kind.
  """
  if kind is not bool:
    return text if kind is str else kind(text.strip())
  words = {"true": True, "1": True, "false": False, "0": False}
  if text.strip().lower() not in words:
    raise ValueError(text)
  return words[text.strip().lower()]


def show(value: Any) -> str:
  """Formats a value as it is written on the command line."""
  if value is None or isinstance(value, bool):
    return str(value).lower()
  return str(value)


@functools.cache
def options_of(cls: type) -> Mapping[str, Option]:
  """Returns the options of a dataclass by name, in declaration order."""
  hints = typing.get_type_hints(cls)
  found = {}
  for field in dataclasses.fields(cls):
    if "text" not in field.metadata:
      continue
    hint = hints[field.name]
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    found[field.name] = Option(
      kind=str if choices else hint,
      default=field.default,
      text=field.metadata["text"],
      choices=choices,
      allowed=field.metadata["allowed"],
    )
  return types.MappingProxyType(found)
