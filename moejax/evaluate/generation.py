"""Generation: samples continuations of texts; `decoding` runs the model.

Generation is dropless unless the router needs a capacity, because drops would depend on
other tokens. Each sample number has its own random stream, so a dropless sample depends
on seed, prompt and sample number, not on its batch.

Letters: V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from moejax.config import Config
from moejax.data.sentinels import SentinelTokenizer
from moejax.errors import UserError
from moejax.evaluate import decoding, restoring
from moejax.models.encoder_decoder import EncoderDecoder
from moejax.types import Params

DEFAULT_TEMPERATURE = 0.8
DEFAULT_MAX_TOKENS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """One sample."""

  prompt: str
  text: str
  """The generated text, without the prompt. Invalid UTF-8, such as a character cut
  off by the limit, becomes the replacement character."""
  tokens: tuple[int, ...]
  """The generated ids, without the final separator."""
  finish: str
  """Why generation ended: separator, max_tokens or context."""
  filled: str | None = None
  """For an encoder-decoder: the prompt with its sentinels replaced by the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
  """All samples, in the order of the prompts, with timings."""

  completions: tuple[Completion, ...]
  num_tokens: int
  """Tokens sampled, including separators."""
  seconds: float
  """Time of the one-token steps, without compilation and prefill."""
  compile_seconds: float
  """Time before the steps: compilation and prefill."""

  @property
  def tokens_per_second(self) -> float:
    """Throughput of all rows, without each row's first token, which the prefill makes."""
    later = self.num_tokens - len(self.completions)
    return later / self.seconds if later > 0 and self.seconds > 0 else math.nan


def context_length(config: Config) -> int:
  """Returns the maximum tokens of a row, including prompt and separator."""
  return config.model.max_position or config.data.sequence_length


def generate(
  model: Any,
  params: Params,
  tokenizer: Any,
  prompts: Sequence[str],
  *,
  max_length: int,
  max_tokens: int = DEFAULT_MAX_TOKENS,
  temperature: float = DEFAULT_TEMPERATURE,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  num_samples: int = 1,
) -> Generated:
  """Samples continuations of prompts.

  Args:
    model: a `moejax.models.decoder.Decoder`.
    params: its parameters.
    tokenizer: of the run; see `moejax.data.tokenizer`.
    prompts: texts; each follows a separator and may be empty.
    max_length: longest row in tokens, including the prompt; see `context_length`.
    max_tokens: maximum tokens to generate per sample.
    temperature: 0 means greedy.
    top_k: 0 means off.
    top_p: 1 means off.
    seed: of the random numbers.
    num_samples: samples per prompt.

  Raises:
    UserError: see `check`.
  """
  encoded = check(
    model,
    tokenizer,
    prompts,
    max_length=max_length,
    max_tokens=max_tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    seed=seed,
    num_samples=num_samples,
  )
  prompts = [prompt for prompt in prompts for _ in range(num_samples)]
  asked = [ids for ids in encoded for _ in range(num_samples)]
  encoded, read = asked, None
  if isinstance(model, EncoderDecoder):
    read = restoring.padded(model, asked, max_length)
    encoded = [[tokenizer.start]] * len(asked)
  decoded = decoding.Engine(model, params).run(
    encoded,
    [min(max_tokens, max_length - len(ids)) for ids in encoded],
    how=decoding.Sampling.of(temperature, top_k, top_p),
    stop=[tokenizer.separator],
    allowed=allowed_ids(tokenizer, model.vocab_size),
    seed=seed,
    streams=[row % num_samples for row in range(len(encoded))],
    read=read,
  )
  completions = []
  for row, new in enumerate(decoded.tokens):
    room = max_length - len(encoded[row])
    seen = None if read is None else asked[row]
    completions.append(_completion(tokenizer, prompts[row], seen, new, room))
  return Generated(
    completions=tuple(completions),
    num_tokens=decoded.num_tokens,
    seconds=decoded.step_seconds,
    compile_seconds=decoded.prefill_seconds,
  )


def allowed_ids(tokenizer: Any, vocab_size: int) -> Bool[np.ndarray, "V"]:
  """Returns the ids that may be sampled, without those that only pad the vocabulary."""
  allowed = np.zeros(vocab_size, bool)
  stands_for_text = np.asarray(tokenizer.bytes_per_token) > 0
  allowed[: len(stands_for_text)] = stands_for_text
  allowed[tokenizer.separator] = True
  if isinstance(tokenizer, SentinelTokenizer):
    allowed[tokenizer.sentinels] = True
  return allowed


def _completion(
  tokenizer: Any, prompt: str, seen: list[int] | None, new: list[int], room: int
) -> Completion:
  """Returns a sample.

  Args:
    tokenizer: of the run.
    prompt: as given.
    seen: the ids that an encoder reads, if there is one.
    new: the generated ids.
    room: number of ids that would fill the context.
  """
  finish = "context" if len(new) == room else "max_tokens"
  if new and new[-1] == tokenizer.separator:
    new, finish = new[:-1], "separator"
  filled = None
  if seen is not None and isinstance(tokenizer, SentinelTokenizer):
    filled = tokenizer.fill(seen[:-1], new)
  return Completion(
    prompt=prompt,
    text=tokenizer.decode(new),
    tokens=tuple(new),
    finish=finish,
    filled=filled,
  )


def check(
  model: Any,
  tokenizer: Any,
  prompts: Sequence[str],
  *,
  max_length: int,
  max_tokens: int,
  temperature: float,
  top_k: int,
  top_p: float,
  seed: int,
  num_samples: int,
) -> list[list[int]]:
  """Validates the arguments of `generate`; needs no parameters.

  Returns:
    The prompts as token ids, each after a separator.

  Raises:
    UserError: a prompt that is not UTF-8 or leaves no room in the context, a number
      out of range, a router with fixed slots, or one that looks at later tokens
      without `moe.allow_future_leak`: unlike in training, it would not see them.
  """
  rules = [
    ("max_tokens", max_tokens, max_tokens >= 1, "1 or more"),
    ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or more"),
    ("top_k", top_k, top_k >= 0, "0 (off) or more"),
    ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (off)"),
    ("seed", seed, 0 <= seed < 2**31, "0 or more, and below 2**31"),
    ("num_samples", num_samples, num_samples >= 1, "1 or more"),
  ]
  for flag, value, is_good, wanted in rules:
    if not is_good:
      raise UserError(f"--{flag}={value} makes no sense: give {wanted}.")
  check_router(model)
  if isinstance(model, EncoderDecoder):
    return [restoring.encode(tokenizer, prompt, max_length) for prompt in prompts]
  return [_encode(tokenizer, prompt, max_length) for prompt in prompts]


def check_router(model: Any) -> None:
  router, allowed = model.router, model.moe.allow_future_leak
  if model.moe_layers and router.fixed_slots:
    raise UserError(
      f"--config.moe.router={router.name} mixes all tokens of a group into a fixed "
      "number of slots, and cannot generate token by token. Evaluate the run instead."
    )
  if model.moe_layers and not router.causal and not allowed:
    raise UserError(
      f"--config.moe.router={router.name} looks at later tokens, which generation does "
      "not have. Give --config.moe.allow_future_leak=true to sample anyway."
    )


def _encode(tokenizer: Any, prompt: str, max_length: int) -> list[int]:
  restoring.check_text(prompt)
  ids = [tokenizer.start, *tokenizer.encode(prompt)]
  if len(ids) >= max_length:
    raise UserError(
      f"The --prompt has {len(ids) - 1} tokens, and the context holds {max_length}: the "
      f"separator before it and at least one generated token need room too. Shorten it "
      f"to {max_length - 2} tokens, or train with a larger --config.data.sequence_length "
      "or --config.model.max_position."
    )
  return ids
