"""Options: fields of a dataclass that can be set by a flag, described where they are
declared.

An option is a dataclass field made by `option`: its type, default and help are there, and
so is what it may be. A `Literal` type lists the words it may be.

Nothing here imports jax.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from moejax.errors import ConfigError, did_you_mean

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclasses.dataclass(frozen=True)
class Range:
  """An interval, open at the ends that say so; the reasons complete the error."""

  low: float = -math.inf
  high: float = math.inf
  why: str = ""
  """Of the lower end, or what a special value means."""
  low_open: bool = False
  high_open: bool = False
  why_high: str = ""

  def __contains__(self, value: float) -> bool:
    # Compared as they are: an int may be larger than any float.
    above = self.low < value if self.low_open else self.low <= value
    below = value < self.high if self.high_open else value <= self.high
    return value not in (math.inf, -math.inf) and above and below

  def __str__(self) -> str:
    """Such as "at least 1" or "above 0 and at most 1"."""
    low = "above" if self.low_open else "at least"
    high = "below" if self.high_open else "at most"
    words = [f"{low} {_plain(self.low)}"] if math.isfinite(self.low) else []
    words += [f"{high} {_plain(self.high)}"] if math.isfinite(self.high) else []
    return " and ".join(words) or "finite"

  def reason(self, value: float) -> str:
    """Why this value is refused; empty if there is no more to say."""
    return (self.why_high if value > self.high else "") or self.why


def _plain(number: float) -> str:
  return f"{number:,.0f}" if number == int(number) and number < 1e12 else f"{number:g}"


def weight(why: str = "0 is off") -> Range:
  """Of a term of the loss."""
  return Range(0, 1e4, why, why_high="the loss would be nothing but this term")


def count(low: int, high: int, why_high: str, why: str = "") -> Range:
  """Of whole things."""
  return Range(low, high, why, why_high=why_high)


def option(default: Any, text: str, allowed: Range | None = None) -> Any:
  """A field of a dataclass that is an option.

  Args:
    default: value without a flag.
    text: what it does, for --list and the docs.
    allowed: of a number.
  """
  return dataclasses.field(default=default, metadata={"text": text, "allowed": allowed})


@dataclasses.dataclass(frozen=True)
class Option:
  """One option of a class, as its field declares it."""

  kind: type
  default: Any
  text: str
  choices: tuple[str, ...]
  """Words it may be; empty if any."""
  allowed: Range | None

  @property
  def expected(self) -> str:
    """What it takes, in words."""
    return f"expected {WORDS[self.kind]}"

  def parse(self, flag: str, text: str) -> Any:
    """The value of what stands on the command line.

    Raises:
      ConfigError: the text is no value of its type.
    """
    try:
      return parse_plain(self.kind, text)
    except ValueError:
      raise ConfigError(f"{flag}={text}: {self.expected}.") from None

  def check(self, flag: str, value: Any) -> None:
    """Refuses a value of another type, an unknown word, and a number out of range.

    Raises:
      ConfigError: names the flag, the value and what is allowed.
    """
    # bool is an int to Python, and `True` for a number is a slip all the same.
    if type(value) is not self.kind and not (self.kind is float and type(value) is int):
      raise ConfigError(f"{flag}={show(value)}: {self.expected}.")
    if self.choices and value not in self.choices:
      raise ConfigError(
        f"{flag}={value} is unknown. {did_you_mean(str(value), self.choices)}"
      )
    if self.allowed is not None and value not in self.allowed:
      reason = self.allowed.reason(value)
      why = f" ({reason})" if reason else ""
      raise ConfigError(f"{flag}={show(value)} must be {self.allowed}{why}.")


def parse_plain(kind: type, text: str) -> Any:
  """A bool, number or text from the command line.

  Raises:
    ValueError: the text is none of that kind.
  """
  if kind is not bool:
    return text if kind is str else kind(text.strip())
  words = {"true": True, "1": True, "false": False, "0": False}
  if text.strip().lower() not in words:
    raise ValueError(text)
  return words[text.strip().lower()]


def show(value: Any) -> str:
  """A value as it is written on the command line."""
  if value is None or isinstance(value, bool):
    return str(value).lower()
  return str(value)


@functools.cache
def options_of(cls: type) -> Mapping[str, Option]:
  """The options of a dataclass by name, in the order of their declaration."""
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
