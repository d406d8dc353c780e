"""Tokens as text: every one visible, and characters whole although tokens cut them."""

import unicodedata

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.analysis.explorer import words

_BYTES = [bytes([i]) for i in range(256)]


def _of_bytes(data: bytes, starts=()) -> list[str]:
  return words.texts(np.array(list(data), np.int64), _BYTES, starts)


def test_the_byte_that_completes_a_character_shows_it():
  """é is two bytes: the first token shows a mark, the second the character."""
  assert _of_bytes("aéb".encode()) == ["a", words.PART, "é", "b"]


def test_bytes_that_are_no_text_are_shown_as_codes():
  """A lone first byte before an end, an id without bytes, or another start."""
  assert _of_bytes(b"\xffa") == ["\\xff", "a"]
  assert _of_bytes(b"a\xc3") == ["a", "\\xc3"]
  assert _of_bytes(b"\xc3\xa9", starts=[1]) == ["\\xc3", "\\xa9"]
  pieces = [*_BYTES, b""]
  assert words.texts(np.array([0xC3, 256, 300]), pieces, ()) == [
    "\\xc3",
    "⟨256⟩",
    "⟨300⟩",
  ]


def test_what_has_no_shape_gets_one():
  """Line ends stay line ends, a direction is told and not followed, emoji stay whole."""
  assert words.visible("\n") == "⏎\n" and words.visible("\t") == "⇥\t"
  assert words.visible("\x1b\u202e") == "⟨1B⟩⟨202E⟩"
  assert words.visible("\u0301") == "◌\u0301"
  family = "\U0001f469\u200d\U0001f467"
  assert words.visible(family) == family
  assert words.visible("\u200d") == "⟨200D⟩"


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=40))
def test_no_token_is_empty_and_none_holds_a_control(data):
  """Whatever bytes come, each has one text, of characters that can be seen."""
  found = _of_bytes(data)
  assert len(found) == len(data) and all(found)
  for c in "".join(found):
    assert c in "\n\t\u200d\u200c" or unicodedata.category(c) not in words._NO_SHAPE
