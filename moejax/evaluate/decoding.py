"""Decoding: batches of prompts, continued token by token, with a cache.

Prompts of different lengths end at the same place. Padding goes before them; no token
attends to it and no expert computes it, and positions count from a prompt's own start. So
a row's result depends only on its own prompt. Prompts are read in chunks (prefill), then
a compiled loop processes one token per step for all rows.

Every size is rounded up to a bucket, and each bucket is compiled once:

  rows      a power of two
  prompt    a power of two up to `buckets.CHUNK`, then a multiple of it
  new       a power of two

A router that needs a capacity depends on its group's size. For such a router nothing is
rounded, and prompts of different lengths run one after the other.

Letters: B rows, P prompt tokens with padding, N maximum new tokens, C tokens of a chunk,
V vocabulary.
"""

import dataclasses
import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.evaluate import groups, restoring
from moejax.evaluate.buckets import LEAST, power_of_two, prompt_size
from moejax.evaluate.sampling import Sampling, sample_token
from moejax.models.make import make_model
from moejax.platform import target_platform
from moejax.types import Params, pytree


@pytree
class Rows:
  """Constant inputs of the loop, for each row."""

  prompt_length: Int[Array, "B"]
  key: Key[Array, "B"]
  allowed: Bool[Array, "V"]
  """The ids that may be sampled."""
  stop: Int[Array, "Z"]
  """The ids that end a row."""


@pytree
class _State:
  """The values that a step reads and replaces."""

  tokens: Int[Array, "B N"]
  """The new tokens; after a row's end, the first stop id."""
  made: Int[Array, ""]
  """Number of new tokens of every row so far."""
  length: Int[Array, "B"]
  """Number of new tokens when the row is done: its limit, unless it stops earlier."""
  cache: Any


@functools.partial(jax.jit, static_argnames=("model", "batch", "length"))
def _empty_cache(model: Any, batch: int, length: int) -> Any:
  return model.init_cache(batch, length)


def _prefill(
  model: Any,
  params: Params,
  tokens: Int[Array, "B C"],
  positions: Int[Array, "B C"],
  cache: Any,
) -> tuple[Float[Array, "B V"], Any]:
  """Reads a chunk; tokens at negative positions are padding.

  Returns:
    The logits after its last token, and the cache.
  """
  out = model(
    params,
    tokens,
    segment_ids=(positions >= 0).astype(jnp.int32),
    positions=jnp.maximum(positions, 0),
    cache=cache,
    capacity_factor=groups.least_factor(model),
    last_only=True,
  )
  return out.logits[:, -1, : model.vocab_size], out.cache


def _draw(
  logits: Float[Array, "B V"],
  number: Int[Array, ""],
  length: Int[Array, "B"],
  rows: Rows,
  how: Sampling,
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
  """Returns every row's new token with this number, and the new lengths."""
  keys = jax.vmap(jax.random.fold_in, (0, None))(rows.key, number)
  draw = functools.partial(sample_token, allowed=rows.allowed, how=how)
  token = jax.vmap(lambda logits, key: draw(logits, key=key))(logits, keys)
  is_done = length <= number
  stops = jnp.any(token[:, None] == rows.stop[None], axis=1)
  length = jnp.where(stops & ~is_done, number + 1, length)
  return jnp.where(is_done, rows.stop[0], token), length


@functools.partial(jax.jit, static_argnames=("width",))
def _first(
  logits: Float[Array, "B V"],
  length: Int[Array, "B"],
  cache: Any,
  rows: Rows,
  how: Sampling,
  *,
  width: int,
) -> _State:
  """Returns the state after the first new token of at most `width`.

  Its cache has room for them, which was not needed while reading the prompt.
  """
  token, length = _draw(logits, jnp.zeros((), jnp.int32), length, rows, how)
  tokens = jnp.full((token.shape[0], width), rows.stop[0])
  tokens = tokens.at[:, 0].set(token)
  made = jnp.ones((), jnp.int32)
  return _State(tokens=tokens, made=made, length=length, cache=cache.longer(width))


def _decode(
  model: Any,
  params: Params,
  state: _State,
  end: Int[Array, ""],
  rows: Rows,
  how: Sampling,
) -> _State:
  """Runs steps until every row has `end` new tokens or is done."""

  def unfinished(state: _State) -> Bool[Array, ""]:
    return (state.made < end) & jnp.any(state.length > state.made)

  def one_token(state: _State) -> _State:
    last = state.made - 1
    token = jax.lax.dynamic_slice_in_dim(state.tokens, last, 1, axis=1)
    is_done = state.length <= state.made
    out = model(
      params,
      token,
      segment_ids=(~is_done).astype(jnp.int32)[:, None],
      positions=(rows.prompt_length + last)[:, None],
      cache=state.cache,
      capacity_factor=groups.least_factor(model),
    )
    logits = out.logits[:, 0, : model.vocab_size]
    drawn, length = _draw(logits, state.made, state.length, rows, how)
    tokens = jax.lax.dynamic_update_slice(state.tokens, drawn[:, None], (0, state.made))
    return _State(tokens=tokens, made=state.made + 1, length=length, cache=out.cache)

  return jax.lax.while_loop(unfinished, one_token, state)


@functools.cache
def programs(platform: str) -> tuple[Any, Any, Any]:
  """Returns the compiled reading of an encoder, prefill and loop for a platform."""
  options = None
  if platform == "cpu" and importlib.metadata.version("jaxlib").startswith("0.10."):
    # This version's YNNPACK products pack the weights again in every call: a tenth of a
    # prefill, a seventh of a step with eight rows. Others may not have the option.
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
  make = functools.partial(jax.jit, static_argnames="model", compiler_options=options)
  return (
    make(restoring.read, static_argnames=("model", "length")),
    make(_prefill, donate_argnames=("cache",)),
    make(_decode, donate_argnames=("state",)),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
  """New tokens of every row, with timings."""

  tokens: list[list[int]]
  """New tokens of each row, with its stop id if it ended with one."""
  prefill_seconds: float
  """Time before the steps, including the compilation of prefill and steps."""
  step_seconds: float
  """Time of the one-token steps."""

  @property
  def num_tokens(self) -> int:
    return sum(len(row) for row in self.tokens)


Stop = Callable[[int, list[int]], bool]
"""(row, its new tokens so far) -> whether the row is done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Requests:
  """The rows of a call, or of a part of it."""

  names: Sequence[int]
  """The number of each row, as passed to a `Stop`."""
  prompts: Sequence[Sequence[int]]
  max_tokens: Sequence[int]
  streams: Sequence[int]
  read: Int[np.ndarray, "n M"] | None

  def by_length(self) -> Iterator["_Requests"]:
    """Yields the rows of each prompt length."""
    for length in sorted({len(prompt) for prompt in self.prompts}):
      rows = [row for row in self.names if len(self.prompts[row]) == length]
      yield _Requests(
        names=rows,
        prompts=[self.prompts[row] for row in rows],
        max_tokens=[self.max_tokens[row] for row in rows],
        streams=[self.streams[row] for row in rows],
        read=None if self.read is None else self.read[rows],
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
  """The settings shared by all rows of a call; see `Engine.run`."""

  how: Sampling
  stop: Sequence[int]
  allowed: Bool[np.ndarray, "V"]
  seed: int
  is_done: Stop | None
  every: int


class Engine:
  """A model that generates, with its parameters laid out for single tokens."""

  def __init__(self, model: Any, params: Params):
    """Copies stacked parameters to one array per layer.

    Args:
      model: a `Decoder` or `EncoderDecoder`.
      params: its parameters. If the caller keeps no reference to them, memory use does
        not grow.
    """
    self.factor = groups.least_factor(model)
    if self.factor is not None:
      # Groups of the training size do not exist yet: each row of a call is one group.
      moe = dataclasses.replace(model.moe, group_size=0)
      model = make_model(model.config, moe, vocab_size=model.vocab_size)
    self.model = model.unrolled
    self.params = model.unroll(params)

  def run(
    self,
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    *,
    how: Sampling,
    stop: Sequence[int],
    allowed: Bool[np.ndarray, "V"],
    seed: int = 0,
    streams: Sequence[int] | None = None,
    is_done: Stop | None = None,
    every: int = 32,
    read: Int[np.ndarray, "n M"] | None = None,
  ) -> Decoded:
    """Continues prompts.

    Args:
      prompts: ids, at least one each.
      max_tokens: maximum new tokens of each.
      how: settings of sampling.
      stop: ids that end a row; may be empty.
      allowed: the ids that may be sampled.
      seed: of the random numbers.
      streams: number of each row's random stream; by default all are the same.
      is_done: called after every `every` steps, to end a row by its text.
      every: see is_done.
      read: an encoder's input for each prompt, -1 for padding.
    """
    requests = _Requests(
      names=range(len(prompts)),
      prompts=prompts,
      max_tokens=max_tokens,
      streams=[0] * len(prompts) if streams is None else streams,
      read=read,
    )
    settings = _Settings(
      how=how, stop=stop, allowed=allowed, seed=seed, is_done=is_done, every=every
    )
    if self.factor is None:
      return self._batch(requests, settings)
    tokens: list[list[int]] = [[] for _ in prompts]
    seconds = [0.0, 0.0]
    for part in requests.by_length():
      decoded = self._batch(part, settings)
      for row, ids in zip(part.names, decoded.tokens, strict=True):
        tokens[row] = ids
      seconds[0] += decoded.prefill_seconds
      seconds[1] += decoded.step_seconds
    return Decoded(tokens=tokens, prefill_seconds=seconds[0], step_seconds=seconds[1])

  def _batch(self, requests: _Requests, settings: _Settings) -> Decoded:
    """Runs rows that share a batch."""
    began = time.perf_counter()
    state, rows = self._first_tokens(requests, settings)
    loop = programs(target_platform())[-1]

    def decode(state: _State, end: int) -> _State:
      bound = jnp.asarray(end, jnp.int32)
      return loop(self.model, self.params, state, bound, rows, settings.how)

    # Compiles the loop by running no step, so that only steps are timed below.
    state = jax.block_until_ready(decode(state, 1))
    compiled = time.perf_counter()
    end, most, is_done = 1, max(requests.max_tokens), settings.is_done
    while end < most:
      end = most if is_done is None else min(most, end + settings.every)
      state = decode(state, end)
      if is_done is not None:
        state = _ended_by_text(state, requests.names, is_done)
    made, length = np.asarray(state.tokens), np.asarray(state.length)
    return Decoded(
      tokens=[made[row, : length[row]].tolist() for row in range(len(requests.prompts))],
      prefill_seconds=compiled - began,
      step_seconds=time.perf_counter() - compiled,
    )

  def _first_tokens(
    self, requests: _Requests, settings: _Settings
  ) -> tuple[_State, Rows]:
    """Reads the prompts and draws the first new token of every row."""
    prompts, batch = requests.prompts, power_of_two(len(requests.prompts), 1)
    longest = max(len(prompt) for prompt in prompts)
    size, chunk = (longest, longest) if self.factor is not None else prompt_size(longest)
    tokens = np.zeros((batch, size), np.int32)
    positions = np.full((batch, size), -1, np.int32)
    for row, prompt in enumerate(prompts):
      tokens[row, size - len(prompt) :] = prompt
      positions[row, size - len(prompt) :] = np.arange(len(prompt))
    base = functools.partial(jax.random.fold_in, jax.random.key(settings.seed))
    rows = Rows(
      prompt_length=jnp.asarray(positions[:, -1] + 1),
      key=jax.vmap(base)(_padded(requests.streams, batch)),
      allowed=jnp.asarray(settings.allowed),
      # No id is below 0, so -1 stops no row.
      stop=jnp.asarray(list(settings.stop) or [-1], jnp.int32),
    )
    read, prefill, _ = programs(target_platform())
    if requests.read is None:
      cache = _empty_cache(self.model, batch, size)
    else:
      missing = ((0, batch - len(prompts)), (0, 0))
      seen = jnp.asarray(np.pad(requests.read, missing, constant_values=-1))
      cache = read(self.model, self.params, seen, length=size)
    logits = None
    for start in range(0, size, chunk):
      part = slice(start, start + chunk)
      logits, cache = prefill(
        *(self.model, self.params),
        *(jnp.asarray(tokens[:, part]), jnp.asarray(positions[:, part]), cache),
      )
    assert logits is not None
    limits = _padded(requests.max_tokens, batch)
    width = power_of_two(max(requests.max_tokens), LEAST)
    return _first(logits, limits, cache, rows, settings.how, width=width), rows


def _ended_by_text(state: _State, names: Sequence[int], is_done: Stop) -> _State:
  """Returns the state, with the rows ended whose text is done."""
  made, length = np.asarray(state.tokens), np.asarray(state.length).copy()
  count = int(state.made)
  for row, name in enumerate(names):
    if length[row] > count and is_done(name, made[row, :count].tolist()):
      length[row] = count
  return dataclasses.replace(state, length=jnp.asarray(length))


def _padded(values: Sequence[int], batch: int) -> Int[Array, "B"]:
  """Returns one value per row, 0 for rows without a prompt."""
  return jnp.asarray([*values, *[0] * (batch - len(values))], jnp.int32)
