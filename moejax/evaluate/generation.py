"""Generation: sampled continuations of prompts, with a cache of keys and values.

The prompts' common length is read in one call (prefill), then a compiled loop
takes one token a step for all rows. A row whose prompt is longer than the common
length is still reading it in the loop: the next token is forced, not sampled. A
row that is done is fed padding, which no expert sees.

Generation is always dropless: with a capacity, a token's fate would depend on its
neighbours in the batch. Every row draws from its own stream of random numbers, so
a sample depends on seed, prompt and sample number, not on the batch it is in.

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
from moejax.errors import UserError
from moejax.evaluate import groups
from moejax.models.decoder import Decoder
from moejax.types import Params, pytree

DEFAULT_TEMPERATURE = 0.8
DEFAULT_MAX_TOKENS = 200


@pytree
class Sampling:
  """How a token is drawn from logits; scalars, so that no value compiles anew."""

  temperature: Float[Array, ""]
  """Divides the logits; 0 takes the most probable token."""
  top_k: Int[Array, ""]
  """Only the k most probable tokens; V or more is all."""
  top_p: Float[Array, ""]
  """Only the fewest tokens whose probability reaches p (arXiv:1904.09751)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """One sample."""

  prompt: str
  text: str
  """What was generated, without the prompt. Bytes that are no UTF-8, such as a
  character cut off by the limit, are shown as the replacement character."""
  tokens: tuple[int, ...]
  """The generated ids, without the separator that ended them."""
  finish: str
  """Why it ends: separator, max_tokens or context."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
  """All samples, in the order of the prompts, and what they took."""

  completions: tuple[Completion, ...]
  num_tokens: int
  """Sampled, separators included."""
  seconds: float
  """Of the one-token steps; compiling and reading the prompts are not in it."""
  compile_seconds: float
  """Of everything before the steps: compiling and reading the prompts."""

  @property
  def tokens_per_second(self) -> float:
    """Over all rows together."""
    return self.num_tokens / self.seconds if self.seconds > 0 else math.nan


def context_length(config: Config) -> int:
  """Tokens, prompt and separator included, that generation may span."""
  return config.model.max_position or config.data.sequence_length


def sample_token(
  logits: Float[Array, "V"], allowed: Bool[Array, "V"], key: Key[Array, ""], how: Sampling
) -> Int[Array, ""]:
  """Draws one token: temperature first, then top-k, then top-p of what is left.

  Equal logits rank by lowest id, so greedy choice is the same everywhere.
  """
  logits = jnp.where(allowed, logits, -jnp.inf)
  order = jnp.argsort(-logits, stable=True).astype(jnp.int32)
  is_greedy = how.temperature <= 0
  ranked = logits[order] / jnp.where(is_greedy, 1.0, how.temperature)
  rank = jnp.arange(ranked.shape[0], dtype=jnp.int32)
  ranked = jnp.where(rank < how.top_k, ranked, -jnp.inf)
  probability = jax.nn.softmax(ranked)
  before = jnp.cumsum(probability) - probability
  # The most probable token stays whatever p is.
  ranked = jnp.where((before < how.top_p) | (rank == 0), ranked, -jnp.inf)
  drawn = jax.random.categorical(key, ranked).astype(jnp.int32)
  return order[jnp.where(is_greedy, 0, drawn)]


@functools.partial(jax.jit, static_argnames=("model", "length"))
def _prefill(
  model: Any, params: Params, tokens: Int[Array, "B P"], *, length: int
) -> tuple[Float[Array, "B V"], Any]:
  """Reads what all prompts have; logits of the next token, and a cache for M."""
  cache = model.init_cache(tokens.shape[0], length)
  out = model(params, tokens, cache=cache, capacity_factor=groups.least_factor(model))
  return out.logits[:, -1], out.cache


@pytree
class _Rows:
  """What the loop needs to know of each row and never changes."""

  prompt_length: Int[Array, "B"]
  limit: Int[Array, "B"]
  """Tokens at which the row ends, prompt included."""
  key: Key[Array, "B"]
  allowed: Bool[Array, "V"]
  """Ids that stand for text, and the separator."""
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
  """Takes one token a step from `start` until `end`, or until all rows are done.

  Returns:
    The tokens, and each row's length, the separator that ended it included.
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
    return step + 1, tokens, out.logits[:, 0], length, out.cache

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
  """Samples continuations.

  Args:
    model: a `moejax.models.decoder.Decoder`.
    params: its parameters.
    tokenizer: of the run; see `moejax.data.tokenizer`.
    prompts: texts; an empty one is fine, as each starts with the separator.
    max_length: longest row in tokens, prompt included; see `context_length`.
    max_tokens: most tokens to generate for each sample.
    temperature: 0 is greedy.
    top_k: 0 is off.
    top_p: 1 is off.
    seed: of the random numbers.
    num_samples: for each prompt.

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
    # Groups of the size trained with do not exist yet: each call is one of its own.
    moe = dataclasses.replace(model.moe, group_size=0)
    model = Decoder(model.config, moe, vocab_size=model.vocab_size)
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
  out, ends, seconds = _run(model, params, tokens, lengths, rows, how)
  completions = tuple(
    _completion(
      tokenizer,
      prompts[row // num_samples],
      out[row, lengths[row] : ends[row]].tolist(),
      is_cut_by_context=bool(ends[row] == max_length),
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
) -> tuple[Int[np.ndarray, "B M"], Int[np.ndarray, "B"], tuple[float, float]]:
  """Prefill and loop; tokens, row lengths, seconds before and inside the loop."""
  began = time.perf_counter()
  start = int(lengths.min())
  first = _prefill(model, params, jnp.asarray(tokens[:, :start]), length=tokens.shape[1])

  def decode(end: int) -> tuple[Array, Array]:
    bounds = jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)
    result = _decode(model, params, jnp.asarray(tokens), *bounds, first, rows, how)
    return jax.block_until_ready(result)

  # A loop of no steps compiles the loop, so that the time below is of steps alone.
  decode(start)
  compiled = time.perf_counter()
  out, ends = decode(tokens.shape[1])
  seconds = (compiled - began, time.perf_counter() - compiled)
  return np.asarray(out), np.asarray(ends), seconds


def _allowed(tokenizer: Any, vocab_size: int) -> Bool[np.ndarray, "V"]:
  """Ids worth sampling: a model's vocabulary may be padded with ids of no text."""
  allowed = np.zeros(vocab_size, bool)
  stands_for_text = np.asarray(tokenizer.bytes_per_token) > 0
  allowed[: len(stands_for_text)] = stands_for_text
  allowed[tokenizer.separator] = True
  return allowed


def _completion(
  tokenizer: Any, prompt: str, ids: list[int], *, is_cut_by_context: bool
) -> Completion:
  finish = "context" if is_cut_by_context else "max_tokens"
  if ids and ids[-1] == tokenizer.separator:
    ids, finish = ids[:-1], "separator"
  return Completion(
    prompt=prompt, text=tokenizer.decode(ids), tokens=tuple(ids), finish=finish
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
  """Refuses what `generate` cannot do; needs no parameters.

  Returns:
    The prompts as token ids, each after a separator.

  Raises:
    UserError: a prompt as long as the context or longer, a bad number, or a router
      that looks at later tokens without `moe.allow_future_leak`: in generation it sees
      only what is there so far, which is not what it was trained with.
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
  try:
    prompt.encode()
  except UnicodeEncodeError:  # What a shell passed on were bytes of another encoding.
    raise UserError(
      f"--prompt={prompt!a} is no UTF-8. Give it as UTF-8, or in a file by --prompt_file."
    ) from None
  ids = [tokenizer.separator, *tokenizer.encode(prompt)]
  if len(ids) >= max_length:
    raise UserError(
      f"The --prompt has {len(ids) - 1} tokens, and the context holds {max_length}: the "
      f"separator before it and at least one generated token need room too. Shorten it "
      f"to {max_length - 2} tokens, or train with a larger --config.data.sequence_length "
      "or --config.model.max_position."
    )
  return ids
