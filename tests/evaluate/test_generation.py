"""Generation: the cache changes nothing, sampling obeys, prompts are checked."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.data.tokenizer import ByteTokenizer
from moejax.errors import UserError
from moejax.evaluate import decoding, generation
from tests.evaluate import tiny

TOKENIZER = ByteTokenizer()

_VARIANTS = {
  "full": {},
  "sliding_window": {
    "model__sliding_window": 5,
    "model__qk_norm": True,
    "model__attention_bias": True,
    "model__tie_embeddings": False,
  },
  "grouped_queries": {
    "model__num_kv_heads": 2,
    "model__num_layers": 3,
    "moe__dense_prefix": 1,
    "moe__num_shared": 1,
  },
}


def _generate(prompts, **kwargs):
  model, params = tiny.model_and_params()
  settings: dict[str, Any] = {"max_length": tiny.LENGTH, "max_tokens": 6} | kwargs
  return generation.generate(model, params, TOKENIZER, prompts, **settings)


@pytest.mark.parametrize("name", _VARIANTS)
def test_cached_logits_equal_uncached_ones(name):
  """Single tokens, after a prefill or not, give the logits of one pass over the text."""
  model, params = tiny.model_and_params(**_VARIANTS[name])
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, 264, (2, 12)), jnp.int32)

  @jax.jit
  def step(tokens, cache):
    out = model(params, tokens, cache=cache, capacity_factor=None)
    return out.logits, out.cache

  whole, _ = step(tokens, None)
  cache, parts, start = model.init_cache(2, 16), [], 0
  for size in (7, *[1] * 5) if name == "full" else [1] * 12:
    logits, cache = step(tokens[:, start : start + size], cache)
    parts.append(logits)
    start += size
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_greedy_is_the_argmax_of_uncached_logits():
  """The loop's tokens, rebuilt one by one without any cache."""
  model, params = tiny.model_and_params()
  sample = _generate(["abcd"], num_samples=3, temperature=0.0).completions[0]
  ids = [TOKENIZER.separator, *b"abcd"]
  logits_of = jax.jit(lambda tokens: model(params, tokens, capacity_factor=None).logits)
  allowed = np.r_[np.ones(257, bool), np.zeros(7, bool)]
  for token in sample.tokens:
    padded = np.full((1, tiny.LENGTH), 0, np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(logits_of(jnp.asarray(padded)))[0, len(ids) - 1]
    assert token == np.argmax(np.where(allowed, logits, -np.inf))
    ids.append(token)


def test_a_sample_does_not_depend_on_its_batch():
  """Rows of other lengths beside it change nothing: each has its own random stream."""
  alone = _generate(["abcd"], num_samples=3).completions
  together = _generate(["abc", "abcd", ""]).completions
  assert together[1] == alone[0]
  assert len({sample.tokens for sample in alone}) == 3


def test_seed_decides():
  """Same seed, same text; another seed, another."""
  first, again, other = (
    _generate(["abcd"], num_samples=3, seed=seed).completions for seed in (1, 1, 2)
  )
  assert first == again
  assert first != other


def test_other_settings_do_not_compile_again():
  """Temperature, top-k, top-p and seed are values of one compiled loop."""
  _generate(["abcd"], num_samples=3)
  compiled = decoding.programs("cpu")[1]
  before = compiled._cache_size()
  _generate(["dcba"], num_samples=3, temperature=0.3, top_k=2, top_p=0.5, seed=9)
  assert compiled._cache_size() == before


def _how(temperature=1.0, top_k=264, top_p=1.0):
  return decoding.Sampling(
    temperature=jnp.float32(temperature),
    top_k=jnp.int32(top_k),
    top_p=jnp.float32(top_p),
  )


@jax.jit
def _draws(logits, allowed, how):
  keys = jax.random.split(jax.random.key(0), 2000)
  draw = jax.vmap(decoding.sample_token, (None, None, 0, None))
  return draw(logits, allowed, keys, how)


def _drawn(logits, how, allowed=None):
  logits = jnp.asarray(logits, jnp.float32)
  allowed = jnp.ones(logits.shape, bool) if allowed is None else jnp.asarray(allowed)
  drawn = np.asarray(_draws(logits, allowed, how))
  return np.bincount(drawn, minlength=len(logits)) / len(drawn)


def test_sampling_follows_the_distribution():
  """Without knobs the frequencies are the softmax's, within 4 standard errors."""
  probability = np.array([0.5, 0.3, 0.15, 0.04, 0.01])
  frequency = _drawn(np.log(probability), _how())
  error = np.sqrt(probability * (1 - probability) / 2000)
  assert np.all(np.abs(frequency - probability) < 4 * error)


def test_top_k_top_p_and_temperature_keep_what_they_say():
  """By hand on (0.5, 0.3, 0.15, 0.04, 0.01), most probable last to test the ranking."""
  logits = np.log([0.01, 0.04, 0.15, 0.3, 0.5])

  def support(**kwargs):
    return set(np.flatnonzero(_drawn(logits, _how(**kwargs))))

  assert support(top_k=2) == {3, 4}
  assert support(top_k=1) == {4}
  # 0.5 does not reach 0.6, 0.5 + 0.3 does.
  assert support(top_p=0.6) == {3, 4}
  assert support(top_p=0.01) == {4}
  assert support(temperature=0.0) == {4}
  # Top-k renormalises before top-p: of (0.5, 0.3), 0.5 is 0.625 of the mass.
  assert support(top_k=2, top_p=0.62) == {4}


def test_ties_and_forbidden_ids():
  """Greedy takes the lowest id of equal logits, and never an id that is not allowed."""
  equal = np.zeros(5)
  assert _drawn(equal, _how(temperature=0.0))[0] == 1
  allowed = [False, True, False, True, False]
  assert set(np.flatnonzero(_drawn(equal, _how(), allowed))) == {1, 3}


def test_unused_ids_of_the_vocabulary_are_never_sampled():
  """Ids 257 to 263 of the bytes tokenizer stand for nothing."""
  allowed = generation.allowed_ids(TOKENIZER, 264)
  np.testing.assert_array_equal(allowed, np.arange(264) <= TOKENIZER.separator)


class _Stubborn:
  """A model whose head prefers one token, `params["token"]`, whatever came before."""

  def __init__(self, model):
    self.model, self.moe, self.moe_layers = model, model.moe, model.moe_layers
    self.vocab_size, self.init_cache = model.vocab_size, model.init_cache
    self.router = model.router

  @functools.cached_property
  def unrolled(self):
    return _Stubborn(self.model.unrolled)

  def unroll(self, params):
    return params | {"model": self.model.unroll(params["model"])}

  def __call__(self, params, *args, **kwargs):
    out = self.model(params["model"], *args, **kwargs)
    is_preferred = jnp.arange(self.vocab_size) == params["token"]
    logits = jnp.where(is_preferred[None, None], 1e4, out.logits)
    return dataclasses.replace(out, logits=logits)


@pytest.fixture(scope="module")
def always():
  """Generates from two prompts, of 2 and 27 bytes, with a model that says one token."""
  model, params = tiny.model_and_params()
  stubborn = _Stubborn(model)

  def run(token):
    return generation.generate(
      stubborn,
      {"model": params, "token": jnp.asarray(token)},
      TOKENIZER,
      ["\u00e9", "a" * 27],
      max_length=32,
      max_tokens=7,
    )

  return run


def test_stops_at_the_separator(always):
  """The separator ends a sample and is not part of its text."""
  out = always(TOKENIZER.separator)
  assert [s.finish for s in out.completions] == ["separator"] * 2
  assert [s.text for s in out.completions] == ["", ""]
  assert out.num_tokens == 2


def test_stops_at_max_tokens_and_at_the_context(always):
  """Whichever comes first is named; half a character becomes the replacement one.

  0xC3 begins a two-byte character, and here no second byte ever comes.
  """
  out = always(0xC3)
  short, long = out.completions
  assert (short.prompt, short.text) == ("\u00e9", "\ufffd" * 7)
  assert short.finish == "max_tokens"
  assert (long.text, long.finish) == ("\ufffd" * 4, "context")
  assert out.tokens_per_second > 0


def test_a_prompt_as_long_as_the_context_is_refused():
  """The error names the limit; one token less is accepted."""
  with pytest.raises(UserError, match=r"--prompt has 31 tokens.*holds 32.*30 tokens"):
    _generate(["x" * 31])
  ids = generation._encode(TOKENIZER, "x" * 30, 32)
  assert len(ids) == 31


@pytest.mark.parametrize(
  "kwargs",
  [
    {"temperature": -1.0},
    {"temperature": float("nan")},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"top_k": -1},
    {"max_tokens": 0},
    {"num_samples": 0},
  ],
)
def test_bad_settings_are_refused_by_name(kwargs):
  """Each error names its flag."""
  with pytest.raises(UserError, match=f"--{next(iter(kwargs))}="):
    _generate(["x"], **kwargs)


def test_a_router_that_looks_ahead_is_refused_unless_asked_for():
  """expert_choice sees later tokens in training; --config.moe.allow_future_leak."""
  changes = {
    "moe__router": "expert_choice",
    "moe__capacity_factor": 1.0,
    "moe__eval_capacity_factor": 1.0,
  }
  settings: dict[str, Any] = {"max_length": tiny.LENGTH, "max_tokens": 2}
  model, params = tiny.model_and_params(**changes)
  with pytest.raises(UserError, match="allow_future_leak"):
    generation.generate(model, params, TOKENIZER, ["x"], **settings)
  model, params = tiny.model_and_params(**changes, moe__allow_future_leak=True)
  made = generation.generate(model, params, TOKENIZER, ["x"], **settings)
  assert made.num_tokens > 0
  changes |= {"moe__router": "soft", "moe__group_size": 16}
  model, params = tiny.model_and_params(**changes, moe__allow_future_leak=True)
  with pytest.raises(UserError, match="cannot generate"):
    generation.generate(model, params, TOKENIZER, ["x"], **settings)


def test_context_is_max_position_or_the_training_length():
  """The default context is what the model was trained on."""
  config = tiny.config()
  assert generation.context_length(config) == tiny.LENGTH
  config.model.max_position = 99
  assert generation.context_length(config) == 99
