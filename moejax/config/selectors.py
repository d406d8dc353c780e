"""Selectors of parameters: a list of patterns over their dotted names.

    embedding.*                       every parameter whose name matches
    *.experts.*[0:4]                  their rows 0 to 3 along the expert axis
    *.router.weight[0]                one row
    !*.experts.*[4:]                  all but these

Patterns are separated by commas and apply in order, so that a later one may take back
what an earlier one selected. If the first begins with `!`, everything is selected before
it. Names are those that `inspect-checkpoint` prints; `*` is any text, `?` one character.
"""

import dataclasses
import re

_ROWS = re.compile(r"\[(\d*)(:?)(\d*)\]$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selector:
  """One pattern of the list."""

  text: str
  """The pattern as written."""
  pattern: str
  """Pattern of the names, with `*` and `?`."""
  takes_back: bool = False
  """Whether it begins with `!`."""
  rows: slice | None = None
  """Rows along the expert axis; None means the whole parameter."""


def parse(text: str) -> list[Selector]:
  """Parses a list of selectors; empty text is an empty list.

  Raises:
    ValueError: a selector is malformed; the message names it.
  """
  return [_selector(part.strip()) for part in text.split(",")] if text.strip() else []


def _selector(text: str) -> Selector:
  pattern = text.removeprefix("!")
  rows = None
  if found := _ROWS.search(pattern):
    first, colon, last = found.groups()
    pattern = pattern[: found.start()]
    start = int(first or 0)
    stop = (int(last) if last else None) if colon else start + 1
    if (not colon and not first) or (stop is not None and stop <= start):
      raise ValueError(f"{text!r} selects no row: give [3], [0:4] or [4:]")
    rows = slice(start, stop)
  if not pattern or set(pattern) & set("![] "):
    raise ValueError(
      f"{text!r} is not a selector: give a name with * and ?, then rows such as [0:4] if "
      "only these are meant"
    )
  return Selector(text=text, pattern=pattern, takes_back=text.startswith("!"), rows=rows)
