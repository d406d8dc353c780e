"""Generation with an encoder-decoder: the cached loop, prompts, and what is refused."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.data.sentinels import with_sentinels
from moejax.data.tokenizer import ByteTokenizer
from moejax.errors import UserError
from moejax.evaluate import decoding, generation, restoring
from moejax.layers.attention import CrossAttention
from moejax.models.make import make_model
from tests.models.test_encoder_decoder import small

PROMPTS = ["ab<extra_id_0>c", "x"]


@pytest.fixture(scope="module")
def config():
  config = small()
  config.data.num_sentinels = 8
  config.moe.eval_capacity_factor = None
  return config


@pytest.fixture(scope="module")
def tokenizer(config):
  return with_sentinels(ByteTokenizer(), config.data)


@pytest.fixture(scope="module")
def model(config, tokenizer):
  return make_model(config.model, config.moe, vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def params(model):
  return jax.jit(model.init)(jax.random.key(5))


def test_greedy_tokens_are_the_best_of_the_uncached_logits(model, params, tokenizer):
  """Two prompts of different lengths together, against each alone and without a cache."""
  generated = generation.generate(
    *(model, params, tokenizer, PROMPTS), max_length=16, max_tokens=5, temperature=0
  )
  logits = jax.jit(lambda p, ids, read: model(p, ids, encoder_tokens=read).logits)
  allowed = np.asarray(tokenizer.bytes_per_token) > 0
  allowed[[tokenizer.separator, *tokenizer.sentinels]] = True
  for prompt, completion in zip(PROMPTS, generated.completions):
    read = tokenizer.encode(prompt)
    if "<" not in prompt:
      read.append(int(tokenizer.sentinels[0]))
    read = jnp.asarray([[*read, tokenizer.separator]])
    for index, token in enumerate(completion.tokens):
      ids = np.full((1, 6), tokenizer.separator)
      ids[0, 0] = tokenizer.start
      ids[0, 1 : 1 + index] = completion.tokens[:index]
      row = np.where(allowed, logits(params, jnp.asarray(ids), read)[0, index], -np.inf)
      assert token == int(np.argmax(row))


def test_a_completion_has_the_prompt_with_its_spans_filled(model, params, tokenizer):
  """Whatever it restored: the text around the sentinel stays."""
  done = generation.generate(
    *(model, params, tokenizer, PROMPTS[:1]), max_length=16, max_tokens=3, seed=1
  ).completions[0]
  assert done.filled == tokenizer.fill(tokenizer.encode(PROMPTS[0]), done.tokens)
  assert done.filled and done.filled.startswith("ab") and done.filled.endswith("c")


@pytest.mark.parametrize(
  ("prompt", "message"),
  [("y" * 16, "The --prompt has 17 tokens"), ("\udcff", "is not UTF-8")],
)
def test_a_prompt_that_cannot_be_read_is_refused(
  model, params, tokenizer, prompt, message
):
  """Before anything is compiled."""
  with pytest.raises(UserError, match=message):
    generation.generate(model, params, tokenizer, [prompt], max_length=16)


def test_a_run_without_sentinels_is_refused(model, params):
  """The byte tokenizer alone has no ids for spans."""
  with pytest.raises(UserError, match="no sentinels"):
    generation.generate(model, params, ByteTokenizer(), ["a"], max_length=16)


def test_the_encoder_may_look_ahead_and_still_generate(config, tokenizer):
  """expert_choice in the encoder; the decoder alone must be causal."""
  other = copy.deepcopy(config)
  other.moe.encoder_router = "expert_choice"
  model = make_model(other.model, other.moe, vocab_size=tokenizer.vocab_size)
  params = jax.jit(model.init)(jax.random.key(5))
  done = generation.generate(
    *(model, params, tokenizer, ["ab"]), max_length=16, max_tokens=2, temperature=0
  )
  assert len(done.completions[0].tokens) <= 2


def test_what_the_encoder_wrote_is_projected_once(model, params, tokenizer, monkeypatch):
  """Keys and values for cross-attention: traced once per block of the decoder, before the
  loop, though 7 tokens are decoded; and again only for another bucket."""
  calls = []
  project = CrossAttention.remember

  def counted(self, memory):
    calls.append(memory.shape[1])
    return project(self, memory)

  monkeypatch.setattr(CrossAttention, "remember", counted)
  made = make_model(model.config, model.moe, vocab_size=model.vocab_size)
  how = {"max_length": 64, "max_tokens": 7, "temperature": 0}
  engine = decoding.Engine(made, params)
  monkeypatch.setattr(decoding, "Engine", lambda model, params: engine)
  for prompts in (PROMPTS[:1], ["abcd"], ["x" * 20]):
    generation.generate(made, params, tokenizer, prompts, **how)
  assert calls == [16] * 4 + [32] * 4


def test_an_encoder_with_a_capacity_reads_a_text_of_the_length_of_training(config):
  """Slots are a share of the group, so a shorter bucket would have fewer."""
  made = {}
  for router in ("", "expert_choice"):
    other = copy.deepcopy(config)
    other.moe.encoder_router = router
    made[router] = make_model(other.model, other.moe, vocab_size=300)
  rows = [[1, 2, 3], [4]]
  wanted = np.asarray([[1, 2, 3], [4, -1, -1]])
  for router, length in (("", 16), ("expert_choice", 50)):
    padded = restoring.padded(made[router], rows, 50)
    assert padded.shape == (2, length)
    np.testing.assert_array_equal(padded[:, :3], wanted)
    assert (padded[:, 3:] == -1).all()
