"""Generation: samples continuations of prompts, with a cache of keys and values.

One call (prefill) runs the length that all prompts have, then a compiled loop
processes one token per step for all rows. Rows with longer prompts finish reading
them in the loop: their next token is forced, not sampled. Finished rows are fed
padding, which no expert processes.

Generation is dropless unless the router needs a capacity, because drops would depend on
other tokens. Each sample number has its own random stream, so a dropless sample depends
on seed, prompt and sample number, not on its batch.

Letters: B rows (prompts times samples), P prefilled tokens, M the longest row,
V vocabulary.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.config import Config
from moejax.data.sentinels import SentinelTokenizer
from moejax.errors import UserError
from moejax.evaluate import groups, restoring
from moejax.models.encoder_decoder import EncoderDecoder
from moejax.models.make import make_model
from moejax.types import Params, pytree

DEFAULT_TEMPERATURE = 0.8
DEFAULT_MAX_TOKENS = 200


@pytree
class Sampling:
  """How to sample a token from logits; arrays, so that new values do not recompile."""

  temperature: Float[Array, ""]
  """Divides the logits; 0 is greedy: the most probable token."""
  top_k: Int[Array, ""]
  """Keeps only the k most probable tokens; V or more keeps all."""
  top_p: Float[Array, ""]
  """Keeps the fewest tokens whose total probability reaches p (arXiv:1904.09751)."""


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
  """Of an encoder-decoder: the prompt with its sentinels replaced by the text."""


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
    """Throughput of all rows together."""
    return self.num_tokens / self.seconds if self.seconds > 0 else math.nan


def context_length(config: Config) -> int:
  """Returns the most tokens of a row, including prompt and separator."""
  return config.model.max_position or config.data.sequence_length


def sample_token(
  logits: Float[Array, "V"], allowed: Bool[Array, "V"], key: Key[Array, ""], how: Sampling
) -> Int[Array, ""]:
  """Samples one token: applies temperature, then top-k, then top-p to the rest.

  Equal logits rank by lowest id, so greedy decoding is the same everywhere.
  """
  logits = jnp.where(allowed, logits, -jnp.inf)
  order = jnp.argsort(-logits, stable=True).astype(jnp.int32)
  is_greedy = how.temperature <= 0
  ranked = logits[order] / jnp.where(is_greedy, 1.0, how.temperature)
  rank = jnp.arange(ranked.shape[0], dtype=jnp.int32)
  ranked = jnp.where(rank < how.top_k, ranked, -jnp.inf)
  probability = jax.nn.softmax(ranked)
  before = jnp.cumsum(probability) - probability
  # The most probable token is kept for any p.
  ranked = jnp.where((before < how.top_p) | (rank == 0), ranked, -jnp.inf)
  drawn = jax.random.categorical(key, ranked).astype(jnp.int32)
  return order[jnp.where(is_greedy, 0, drawn)]


@functools.partial(jax.jit, static_argnames=("model", "length"))
def _prefill(
  model: Any, params: Params, tokens: Int[Array, "B P"], *, length: int
) -> tuple[Float[Array, "B V"], Any]:
  """Runs P tokens; returns next-token logits and a cache for M tokens."""
  cache = model.init_cache(tokens.shape[0], length)
  out = model(params, tokens, cache=cache, capacity_factor=groups.least_factor(model))
  return out.logits[:, -1, : model.vocab_size], out.cache


@pytree
class _Rows:
  """Constant inputs of the loop, for each row."""

  prompt_length: Int[Array, "B"]
  limit: Int[Array, "B"]
  """Maximum length of the row, including the prompt."""
  key: Key[Array, "B"]
  allowed: Bool[Array, "V"]
  """The ids with text, and the separator."""
  separator: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("model",))
def _decode(
  model: Any,
  params: Params,
  tokens: Int[Array, "B M"],
  start: Int[Array, ""],
  end: Int[Array, ""],
  first: tuple[Float[Array, "B V"], Any],
  rows: _Rows,
  how: Sampling,
) -> tuple[Int[Array, "B M"], Int[Array, "B"]]:
  """Processes one token per step from `start` to `end`, or until all rows are done.

  Returns:
    The tokens, and each row's length, including its final separator.
  """

  def unfinished(state: Any) -> Bool[Array, ""]:
    step, _, _, length, _ = state
    return (step < end) & jnp.any(length > step)

  def one_token(state: Any) -> Any:
    step, tokens, logits, length, cache = state
    keys = jax.vmap(jax.random.fold_in)(rows.key, step - rows.prompt_length)
    draw = functools.partial(sample_token, allowed=rows.allowed, how=how)
    drawn = jax.vmap(lambda logits, key: draw(logits, key=key))(logits, keys)
    is_prompt = step < rows.prompt_length
    is_done = length <= step
    token = jnp.where(is_prompt, tokens[:, step], drawn)
    token = jnp.where(is_done, rows.separator, token)
    tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, step))
    ends = ~is_prompt & ~is_done & (token == rows.separator)
    length = jnp.where(ends, step + 1, length)
    out = model(
      params,
      token[:, None],
      segment_ids=(~is_done).astype(jnp.int32)[:, None],
      cache=cache,
      capacity_factor=groups.least_factor(model),
    )
    return step + 1, tokens, out.logits[:, 0, : model.vocab_size], length, out.cache

  logits, cache = first
  state = (start, tokens, logits, rows.limit, cache)
  _, tokens, _, length, _ = jax.lax.while_loop(unfinished, one_token, state)
  return tokens, length


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
    prompts: texts, each run after a separator and so possibly empty.
    max_length: longest row in tokens, including the prompt; see `context_length`.
    max_tokens: most tokens to generate per sample.
    temperature: 0 is greedy.
    top_k: 0 is off.
    top_p: 1 is off.
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
  if groups.least_factor(model) is not None:
    # Groups of the training size do not exist yet: each row of a call is one group.
    moe = dataclasses.replace(model.moe, group_size=0)
    model = make_model(model.config, moe, vocab_size=model.vocab_size)
  read, asked = None, encoded
  if isinstance(model, EncoderDecoder):
    read = np.repeat(restoring.padded(encoded, max_length), num_samples, axis=0)
    encoded = [[tokenizer.start]] * len(encoded)
  lengths = np.repeat([len(ids) for ids in encoded], num_samples).astype(np.int32)
  limits = np.minimum(lengths + max_tokens, max_length)
  tokens = np.full((len(lengths), int(limits.max())), tokenizer.separator, np.int32)
  for row in range(len(lengths)):
    tokens[row, : lengths[row]] = encoded[row // num_samples]

  streams = jnp.asarray(np.tile(np.arange(num_samples, dtype=np.int32), len(prompts)))
  rows = _Rows(
    prompt_length=jnp.asarray(lengths),
    limit=jnp.asarray(limits, jnp.int32),
    key=jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(streams),
    allowed=jnp.asarray(_allowed(tokenizer, model.vocab_size)),
    separator=jnp.asarray(tokenizer.separator, jnp.int32),
  )
  how = Sampling(
    temperature=jnp.asarray(temperature, jnp.float32),
    top_k=jnp.asarray(top_k or model.vocab_size, jnp.int32),
    top_p=jnp.asarray(top_p, jnp.float32),
  )
  out, ends, seconds = _run(model, params, tokens, lengths, rows, how, read)
  completions = tuple(
    _completion(
      tokenizer,
      prompts[row // num_samples],
      out[row, lengths[row] : ends[row]].tolist(),
      is_cut_by_context=bool(ends[row] == max_length),
      asked=None if read is None else asked[row // num_samples],
    )
    for row in range(len(lengths))
  )
  return Generated(
    completions=completions,
    num_tokens=int((ends - lengths).sum()),
    seconds=seconds[1],
    compile_seconds=seconds[0],
  )


def _run(
  model: Any,
  params: Params,
  tokens: Int[np.ndarray, "B M"],
  lengths: Int[np.ndarray, "B"],
  rows: _Rows,
  how: Sampling,
  read: Int[np.ndarray, "B N"] | None = None,
) -> tuple[Int[np.ndarray, "B M"], Int[np.ndarray, "B"], tuple[float, float]]:
  """Returns tokens, row lengths, and seconds before and inside the loop.

  `read` is what an encoder reads, -1 for padding.
  """
  began = time.perf_counter()
  start = int(lengths.min())
  begin, length = jnp.asarray(tokens[:, :start]), tokens.shape[1]
  if read is None:
    first = _prefill(model, params, begin, length=length)
  else:
    seen = jnp.asarray(np.maximum(read, 0)), jnp.asarray((read >= 0).astype(np.int32))
    first = restoring.read(model, params, begin, *seen, length=length)

  def decode(end: int) -> tuple[Array, Array]:
    bounds = jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)
    result = _decode(model, params, jnp.asarray(tokens), *bounds, first, rows, how)
    return jax.block_until_ready(result)

  # Compiles the loop by running zero steps, so that only steps are timed below.
  decode(start)
  compiled = time.perf_counter()
  out, ends = decode(tokens.shape[1])
  seconds = (compiled - began, time.perf_counter() - compiled)
  return np.asarray(out), np.asarray(ends), seconds


def _allowed(tokenizer: Any, vocab_size: int) -> Bool[np.ndarray, "V"]:
  """Returns the ids to sample: a vocabulary may be padded with ids without text."""
  allowed = np.zeros(vocab_size, bool)
  stands_for_text = np.asarray(tokenizer.bytes_per_token) > 0
  allowed[: len(stands_for_text)] = stands_for_text
  allowed[tokenizer.separator] = True
  if isinstance(tokenizer, SentinelTokenizer):
    allowed[tokenizer.sentinels] = True
  return allowed


def _completion(
  tokenizer: Any,
  prompt: str,
  ids: list[int],
  *,
  is_cut_by_context: bool,
  asked: list[int] | None = None,
) -> Completion:
  finish = "context" if is_cut_by_context else "max_tokens"
  if ids and ids[-1] == tokenizer.separator:
    ids, finish = ids[:-1], "separator"
  filled = None
  if asked is not None and isinstance(tokenizer, SentinelTokenizer):
    filled = tokenizer.fill(asked[:-1], ids)
  return Completion(
    prompt=prompt,
    text=tokenizer.decode(ids),
    tokens=tuple(ids),
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
  _check_router(model)
  if isinstance(model, EncoderDecoder):
    return [restoring.encode(tokenizer, prompt, max_length) for prompt in prompts]
  return [_encode(tokenizer, prompt, max_length) for prompt in prompts]


def _check_router(model: Any) -> None:
  router, allowed = model.router, model.moe.allow_future_leak
  if model.moe_layers and router.fixed_slots:
    raise UserError(
      f"--config.moe.router={router.name} mixes all tokens of a group in a fixed number "
      "of slots, and cannot generate token by token. Evaluate the run instead."
    )
  if model.moe_layers and not router.causal and not allowed:
    raise UserError(
      f"--config.moe.router={router.name} looks at later tokens, which generation does "
      "not have. Give --config.moe.allow_future_leak=true to sample from it all the same."
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
