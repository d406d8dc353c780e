"""Generation with an encoder-decoder: the encoder reads the prompt once.

The prompt has sentinels where spans are to be restored, and ends with the separator. The
decoder starts with the tokenizer's start. Cross-attention's keys and values are computed
once, from the prompts padded to a bucket.

Letters: B rows, M tokens that the encoder reads.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from moejax.data.sentinels import SentinelTokenizer
from moejax.errors import UserError
from moejax.evaluate import groups
from moejax.evaluate.buckets import LEAST, power_of_two
from moejax.models.encoder_decoder import EncoderDecoder
from moejax.models.output import Cache
from moejax.types import Params


def read(model: Any, params: Params, seen: Int[Array, "B M"], *, length: int) -> Cache:
  """Runs the encoder; returns a cache to decode `length` tokens with.

  Tokens below 0 are padding.
  """
  return model.start(
    params,
    jnp.maximum(seen, 0),
    length=length,
    segment_ids=(seen >= 0).astype(jnp.int32),
    capacity_factor=groups.encoder_factor(model),
  )


def encode(tokenizer: Any, prompt: str, max_length: int) -> list[int]:
  """Returns the encoder's input; a prompt without sentinels gets one at the end."""
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
      f"The --prompt has {len(ids)} tokens with its sentinels, but the encoder reads "
      f"{max_length - 1}. Shorten it, or train with a larger "
      "--config.data.sequence_length or --config.model.max_position."
    )
  return [*ids, tokenizer.separator]


def check_text(prompt: str) -> None:
  """Raises UserError for a prompt that is not text."""
  try:
    prompt.encode()
  except UnicodeEncodeError:  # The shell passed bytes of another encoding.
    raise UserError(
      f"--prompt={prompt!a} is not UTF-8. Give it as UTF-8, or in a file with "
      "--prompt_file."
    ) from None


def padded(
  model: EncoderDecoder, rows: list[list[int]], most: int
) -> Int[np.ndarray, "n M"]:
  """Returns the encoder's input, padded with -1 to a bucket of at most `most`.

  A router that needs a capacity counts a group's padding, so for it the length is `most`,
  as in training.
  """
  longest, length = max(len(ids) for ids in rows), most
  if not (model.encoder.moe_layers and model.encoder.router.needs_capacity):
    length = min(power_of_two(longest, LEAST), most)
  padded = np.full((len(rows), length), -1, np.int32)
  for row, ids in enumerate(rows):
    padded[row, : len(ids)] = ids
  return padded
