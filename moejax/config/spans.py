"""Span corruption: the numbers of replaced tokens and spans of a text, and its lengths.

A text of n tokens has round(n * density) of them replaced, at least one and at most
n - 1, in round(replaced / mean length) spans, at least one. The encoder sees the rest, a
sentinel for each span and the separator; the decoder predicts each sentinel, its span,
and the separator at the end. So the lengths follow from n alone, and a row can be packed
before any mask is drawn.

Source: T5, arXiv:1910.10683, section 3.1.4, and its released code (random_spans_helper).
Halves are rounded up here, and to even there: of 30 tokens at density 0.15, 5 are
replaced here and 4 there.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from moejax.config.schema import DataConfig

DECODER_MULTIPLE = 8
"""A derived decoder length is a multiple of this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans:
  """Sizes of the objective, from the configuration."""

  density: float
  mean_length: float
  encoder_length: int
  """Tokens of a row of the encoder."""
  decoder_length: int
  """Tokens of a row of the decoder."""

  @functools.cached_property
  def longest(self) -> int:
    """Maximum tokens of one text that fit a row of the encoder and of the decoder."""
    fits = (self.encoder_sizes <= self.encoder_length) & (
      self.decoder_sizes <= self.decoder_length
    )
    return int(np.flatnonzero(fits)[-1])

  @functools.cached_property
  def encoder_sizes(self) -> Int[np.ndarray, "n"]:
    """Encoder tokens for a text of n tokens, indexed by n; non-decreasing."""
    return _sizes(self.density, self.mean_length, self._most)[0]

  @functools.cached_property
  def decoder_sizes(self) -> Int[np.ndarray, "n"]:
    """Decoder tokens for a text of n tokens, indexed by n; non-decreasing."""
    return _sizes(self.density, self.mean_length, self._most)[1]

  @property
  def most_spans(self) -> int:
    """Spans, and so sentinels, of the longest text."""
    return int(num_spans(self.longest, self.density, self.mean_length))

  @property
  def _most(self) -> int:
    return _most_tokens(self.encoder_length, self.density)


def spans_of(data: DataConfig) -> Spans:
  """Returns the sizes under span_corruption."""
  density, mean, length = data.noise_density, data.mean_span_length, data.sequence_length
  decoder_length = data.decoder_length
  if not decoder_length:
    encoder, decoder = _sizes(density, mean, _most_tokens(length, density))
    whole = int(decoder[np.flatnonzero(encoder <= length)[-1]])
    decoder_length = -(-whole // DECODER_MULTIPLE) * DECODER_MULTIPLE
  return Spans(
    density=density,
    mean_length=mean,
    encoder_length=length,
    decoder_length=decoder_length,
  )


def target_length(data: DataConfig) -> int:
  """Returns the targets of a row: S, or the decoder's length under span_corruption."""
  if data.objective == "span_corruption":
    return spans_of(data).decoder_length
  return data.sequence_length


def num_replaced(tokens: Int[np.ndarray, "*n"] | int, density: float) -> np.ndarray:
  """Returns how many of a text's tokens are replaced."""
  tokens = np.asarray(tokens)
  wanted = np.floor(tokens * density + 0.5).astype(np.int64)
  return np.asarray(np.clip(wanted, 1, np.maximum(tokens - 1, 1)))


def num_spans(
  tokens: Int[np.ndarray, "*n"] | int, density: float, mean_length: float
) -> np.ndarray:
  """Returns the number of spans in a text of this many tokens.

  It is at most the number of kept tokens, since one is kept before each span.
  """
  replaced = num_replaced(tokens, density)
  wanted = np.floor(replaced / mean_length + 0.5).astype(np.int64)
  kept = np.asarray(tokens) - replaced
  return np.asarray(np.clip(wanted, 1, np.maximum(np.minimum(replaced, kept), 1)))


def _sizes(density: float, mean: float, most: int) -> tuple[np.ndarray, np.ndarray]:
  tokens = np.arange(most + 1)
  replaced, spans = num_replaced(tokens, density), num_spans(tokens, density, mean)
  encoder, decoder = tokens - replaced + spans + 1, replaced + spans + 1
  # An empty text takes no tokens. In a text of one token, that token is replaced.
  encoder[0] = decoder[0] = 0
  return encoder, decoder


def _most_tokens(length: int, density: float) -> int:
  """Returns a number of tokens that does not fit an encoder row of `length`."""
  return int(length / (1 - density)) + 8
