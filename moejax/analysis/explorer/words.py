"""Tokens as text for display: every token is visible, for any bytes.

A token's bytes may be part of a character. The token that completes the character shows
it, and the ones before show only a mark. Characters without a shape (controls, text
directions, zero-width spaces) are shown by their codes, so that no token can be invisible
or change the direction of the page.
"""

import codecs
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

PART = "\u2026"
"""Stands for a token that only begins or continues a character."""

_SHOWN = {"\n": "\u23ce\n", "\r": "\u240d", "\t": "\u21e5\t"}
_NO_SHAPE = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"


def texts(
  tokens: Int[np.ndarray, "n"], pieces: Sequence[bytes], starts: Iterable[int]
) -> list[str]:
  """Returns the visible text of each token.

  Args:
    tokens: ids.
    pieces: bytes of each id; empty or absent ones are shown by their id.
    starts: indices at which a new text begins, where no character can continue.
  """
  begins, found = set(starts), []
  decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
  for index, token in enumerate(tokens.tolist()):
    if index in begins and found:
      found[-1] = _joined(found[-1], decoder.decode(b"", final=True))
      decoder.reset()
    piece = pieces[token] if token < len(pieces) else b""
    if not piece:
      rest = decoder.decode(b"", final=True)
      decoder.reset()
      if rest and found:
        found[-1] = _joined(found[-1], rest)
      found.append(f"\u27e8{token}\u27e9")
      continue
    found.append(visible(decoder.decode(piece)) or PART)
  if found:
    found[-1] = _joined(found[-1], decoder.decode(b"", final=True))
  return found


def _joined(text: str, rest: str) -> str:
  """Adds bytes that turned out not to be a character."""
  return text if not rest else rest if text == PART else text + rest


def visible(text: str) -> str:
  """Returns a text in which every character is visible."""
  out = "".join(_character(c, len(text)) for c in text)
  # A combining mark alone would be drawn on the token before.
  return "\u25cc" + out if out and unicodedata.combining(out[0]) else out


def _character(c: str, length: int) -> str:
  if c in _SHOWN:
    return _SHOWN[c]
  if unicodedata.category(c) in _NO_SHAPE and not (c in _JOINERS and length > 1):
    return f"\u27e8{ord(c):X}\u27e9"
  return c
