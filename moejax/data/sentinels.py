"""A tokenizer with sentinels: ids that stand for the places of replaced spans.

They follow all ids of the tokenizer, the first one last: sentinel k of a vocabulary of V
is V - 1 - k (T5, arXiv:1910.10683, released code). A published tokenizer has its own
among its ids, `<extra_id_0>` and so on. A run stores the tokenizer only; the number of
sentinels is in its configuration.
"""

import functools
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from moejax.config import DataConfig
from moejax.data.tokenizer import Ids, ImportedTokenizer, Tokenizer
from moejax.storage.paths import RunPath

_MARK = re.compile(rb"<extra_id_(\d+)>")
"""The form of a sentinel in prompts and completions."""


def with_sentinels(base: Tokenizer, data: DataConfig) -> Tokenizer:
  """Returns the tokenizer of a run: with sentinels, if its objective needs them."""
  if data.objective != "span_corruption":
    return base
  return SentinelTokenizer(base, data.num_sentinels)


def mark(index: int) -> str:
  """Returns the text form of a sentinel."""
  return f"<extra_id_{index}>"


class SentinelTokenizer(Tokenizer):
  """Another tokenizer's ids, then the sentinels."""

  def __init__(self, base: Tokenizer, count: int):
    self.base, self.kind, self.separator = base, base.kind, base.separator
    self.vocab_size = base.vocab_size
    own = _own_ids(base, count)
    if own is None:
      self.vocab_size += count
      own = self.vocab_size - 1 - np.arange(count, dtype=np.int32)
    self.sentinels: Int[np.ndarray, "n"] = own
    """The id of each sentinel, the first one first."""

  @property
  def start(self) -> int:
    return self.base.start

  @functools.cached_property
  def index_of(self) -> dict[int, int]:
    """Maps each sentinel's id to its index."""
    return {int(token): index for index, token in enumerate(self.sentinels)}

  def encode_batch(self, texts: Sequence[bytes]) -> list[Int[np.ndarray, "n"]]:
    """Encodes as the base class; `<extra_id_0>` and so on become sentinels."""
    return [self._encode(text) for text in texts]

  def _encode(self, text: bytes) -> Int[np.ndarray, "n"]:
    pieces: list[np.ndarray] = []
    # Splitting by a pattern with a group gives text and sentinel numbers in turn.
    for place, part in enumerate(_MARK.split(text)):
      is_mark = place % 2 == 1
      if is_mark and int(part) < len(self.sentinels):
        pieces.append(self.sentinels[[int(part)]])
      elif is_mark or part:
        plain = mark(int(part)).encode() if is_mark else part
        pieces.append(self.base.encode_batch([plain])[0])
    return np.concatenate(pieces or [np.zeros(0, np.int32)]).astype(np.int32)

  def decode(self, ids: Ids) -> str:
    """Decodes as the base class; sentinels are shown as in a prompt."""
    flat = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
    text, after = "", 0
    for place, token in enumerate(flat.reshape(-1).tolist()):
      if token in self.index_of:
        text += self.base.decode(flat[after:place]) + mark(self.index_of[token])
        after = place + 1
    return text + self.base.decode(flat[after:])

  def fill(self, prompt: Ids, restored: Ids) -> str:
    """Returns the prompt's text with its sentinels replaced by the restored spans.

    Args:
      prompt: ids with sentinels.
      restored: the decoder's prediction: each sentinel, then its span. Sentinels that it
        did not restore stay in the text.
    """
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in list(restored):
      if int(token) in self.index_of:
        current = spans.setdefault(int(token), [])
      else:
        current.append(int(token))
    filled: list[int] = []
    for token in list(prompt):
      filled += spans.get(int(token), [int(token)])
    return self.decode(filled)

  def save(self, workdir: RunPath) -> None:
    """Stores the tokenizer without sentinels."""
    self.base.save(workdir)

  def _make_pieces(self) -> list[bytes]:
    pieces = self.base.pieces + [b""] * (self.vocab_size - self.base.vocab_size)
    for token in self.index_of:
      pieces[token] = b""
    return pieces

  def _model(self) -> str:
    return self.base.fingerprint


def _own_ids(base: Tokenizer, count: int) -> Int[np.ndarray, "n"] | None:
  """Returns the sentinels of a published tokenizer; None if the ids come after it."""
  if not isinstance(base, ImportedTokenizer):
    return None
  known = [base.id_of(mark(index)) for index in range(count)]
  found = [token for token in known if token is not None]
  if len(found) == count:
    return np.array(found, np.int32)
  # The model has no rows for more ids.
  return base.vocab_size - 1 - np.arange(count, dtype=np.int32)
