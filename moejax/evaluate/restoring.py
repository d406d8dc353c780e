"""Generation with an encoder-decoder: the encoder reads the prompt once.

The prompt has sentinels where spans are to be restored, and ends with the separator; the
decoder starts with the tokenizer's start. Keys and values that cross-attention reads are
computed once, from the prompts padded to the context's length.

Letters: B rows, N tokens that the encoder reads, V vocabulary.
"""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.data.sentinels import SentinelTokenizer
from moejax.errors import UserError
from moejax.evaluate import groups
from moejax.types import Params


@functools.partial(jax.jit, static_argnames=("model", "length"))
def read(
  model: Any,
  params: Params,
  tokens: Int[Array, "B 1"],
  seen: Int[Array, "B N"],
  segment_ids: Int[Array, "B N"],
  *,
  length: int,
) -> tuple[Float[Array, "B V"], Any]:
  """Runs encoder and start; returns next-token logits and a cache for `length` tokens."""
  factor = groups.least_factor(model)
  cache = model.start(
    params, seen, length=length, segment_ids=segment_ids, capacity_factor=factor
  )
  out = model(params, tokens, cache=cache, capacity_factor=factor)
  return out.logits[:, -1, : model.vocab_size], out.cache


def encode(tokenizer: Any, prompt: str, max_length: int) -> list[int]:
  """Returns what the encoder reads; without a sentinel there is one at the end."""
  if not isinstance(tokenizer, SentinelTokenizer):
    raise UserError(
      "This run's tokenizer has no sentinels, which an encoder-decoder is prompted with. "
      "Give a run trained under --config.data.objective=span_corruption."
    )
  check_text(prompt)
  ids = tokenizer.encode(prompt)
  if not any(token in tokenizer.index_of for token in ids):
    ids.append(int(tokenizer.sentinels[0]))
  if len(ids) + 1 > max_length:
    raise UserError(
      f"The --prompt has {len(ids)} tokens with its sentinels, and the encoder reads "
      f"{max_length - 1}. Shorten it, or train with a larger "
      "--config.data.sequence_length or --config.model.max_position."
    )
  return [*ids, tokenizer.separator]


def check_text(prompt: str) -> None:
  """Raises UserError for a prompt that is no text."""
  try:
    prompt.encode()
  except UnicodeEncodeError:  # The shell passed bytes of another encoding.
    raise UserError(
      f"--prompt={prompt!a} is no UTF-8. Give it as UTF-8, or in a file by --prompt_file."
    ) from None


def padded(rows: list[list[int]], length: int) -> Int[np.ndarray, "n N"]:
  """Returns what the encoder reads, padded with -1 to one length for all prompts."""
  padded = np.full((len(rows), length), -1, np.int32)
  for row, ids in enumerate(rows):
    padded[row, : len(ids)] = ids
  return padded
