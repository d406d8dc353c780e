"""The decoder: what it may see, and that its ways of running agree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ModelConfig, MoEConfig
from moejax.config.pattern import layer_pattern
from moejax.models.decoder import Decoder

V, S = 23, 10
MOE = {"num_experts": 4, "hidden": 16, "capacity_factor": None, "dispatcher": "einsum"}


def make(moe=None, **model):
  sizes: dict[str, Any] = {"num_layers": 2, "width": 16, "num_heads": 2, "hidden": 32}
  config = ModelConfig(**sizes | model)
  decoder = Decoder(config, MoEConfig(**MOE | (moe or {})), vocab_size=V)
  return decoder, jax.jit(decoder.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
  return jax.random.randint(jax.random.key(1), (2, S), 0, V)


def input_gradients(decoder, params, tokens, segment_ids, row, position):
  """|d logits[row, position] / d embedding of each input position|, [B, S].

  The tokens are replaced by unique rows of a made-up table, so that the gradient
  of the table says which input positions a logit depends on.
  """
  unique = jnp.arange(tokens.size).reshape(tokens.shape)
  table = jax.random.normal(jax.random.key(9), (tokens.size, 16))
  wide = Decoder(decoder.config, decoder.moe, vocab_size=tokens.size)

  def score(table):
    embedding = {**params["embedding"], "table": table}
    logits = wide(
      {**params, "embedding": embedding}, unique, segment_ids=segment_ids
    ).logits
    return jnp.sum(jnp.square(logits), axis=-1)[row, position]

  gradient = jax.jit(jax.grad(score))(table)
  return np.abs(gradient).sum(-1).reshape(tokens.shape)


def test_no_logit_depends_on_a_later_token_or_another_row(tokens):
  """Causality by gradients: the only complete check, no reading of masks needed."""
  decoder, params = make(tie_embeddings=False)
  for position in (0, S // 2, S - 1):
    seen = input_gradients(decoder, params, tokens, None, 0, position)
    assert (seen[0, : position + 1] > 0).all()
    assert (seen[0, position + 1 :] == 0).all() and (seen[1] == 0).all()


def test_no_logit_depends_on_another_document_of_its_row(tokens):
  """Segment isolation by gradients; padding neither sees nor is seen."""
  decoder, params = make(tie_embeddings=False)
  segments = jnp.asarray([[1] * 4 + [2] * 4 + [0] * 2, [1] * S], jnp.int32)
  seen = input_gradients(decoder, params, tokens, segments, 0, 6)
  assert (seen[0, 4:7] > 0).all()
  assert seen[0, :4].sum() == seen[0, 7:].sum() == seen[1].sum() == 0


def test_a_window_sees_so_many_tokens_and_no_more(tokens):
  """One layer with window 3: a token sees itself and two back."""
  decoder, params = make(
    {"every": 1, "offset": 0}, num_layers=1, sliding_window=3, tie_embeddings=False
  )
  seen = input_gradients(decoder, params, tokens, None, 0, 7)
  assert (seen[0, 5:8] > 0).all() and seen[0, :5].sum() == 0


def test_documents_packed_in_a_row_get_the_logits_they_get_alone(tokens):
  """Packing is invisible: same positions, own segment, dropless."""
  decoder, params = make()
  segments = jnp.asarray([[1] * 4 + [2] * 6, [1] * S], jnp.int32)
  positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], list(range(S))], jnp.int32)
  run = jax.jit(decoder)
  packed = run(params, tokens, segment_ids=segments, positions=positions).logits
  alone = run(params, tokens[:1, 4:]).logits
  np.testing.assert_allclose(packed[:1, 4:], alone, atol=2e-5)


VARIANTS = {
  "plain": {},
  "grouped_queries": {"num_kv_heads": 1, "qk_norm": True, "attention_bias": True},
  "window": {"sliding_window": 4},
  "swiglu_untied": {"activation": "swiglu", "tie_embeddings": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_and_uncached_logits_agree(name, tokens):
  """A prompt at once, then token by token, equals the whole sequence at once."""
  decoder, params = make(**VARIANTS[name])
  full = jax.jit(decoder)(params, tokens).logits
  run = jax.jit(lambda p, t, c: decoder(p, t, cache=c))
  output = run(params, tokens[:, :4], decoder.init_cache(2, S + 2))
  pieces = [output.logits]
  for index in range(4, S):
    output = run(params, tokens[:, index : index + 1], output.cache)
    pieces.append(output.logits)
  np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, atol=2e-5)


def loss_and_gradient(decoder, params, tokens):
  def loss(params):
    output = decoder(params, tokens, train=True, key=jax.random.key(4))
    return jnp.mean(jnp.square(output.logits)) + output.aux["balance_loss"]

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
  "change",
  [{"remat": "full"}, {"remat": "offload"}, {"remat": "dots"}, {"scan_layers": False}],
)
def test_scanned_unrolled_and_recomputed_models_are_the_same(change, tokens):
  """Scan and rematerialisation change when things are computed, never what."""
  moe = {"capacity_factor": 1.0}
  base, params = make(moe, num_layers=5)
  other, _ = make(moe, num_layers=5, **change)
  value, gradient = loss_and_gradient(base, params, tokens)
  value2, gradient2 = loss_and_gradient(other, params, tokens)
  np.testing.assert_allclose(value, value2, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient2), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
  ("layers", "moe", "expected"),
  [
    (4, {}, [1, 3]),
    (4, {"every": 1, "offset": 0}, [0, 1, 2, 3]),
    (5, {"every": 2, "dense_prefix": 1}, [2, 4]),
    (7, {"every": 3, "offset": 2}, [2, 5]),
    (6, {"every": 4, "offset": 1, "dense_prefix": 1}, [2]),
    (4, {"dense_twin": True}, []),
  ],
)
def test_moe_layers_stand_where_every_offset_and_prefix_say(layers, moe, expected):
  """By hand; the parameters have one stacked entry per repeat."""
  decoder, params = make(moe, num_layers=layers)
  assert list(decoder.moe_layers) == expected
  repeats = layer_pattern(layers, decoder.moe).repeats
  assert all(leaf.shape[0] == repeats for leaf in jax.tree.leaves(params["unit"]))


def test_every_parameter_names_each_of_its_dimensions():
  """The axes tree has the parameters' structure, and as many names as dimensions."""
  decoder, params = make(
    {"num_shared": 1, "dense_prefix": 1},
    num_layers=4,
    qk_norm=True,
    attention_bias=True,
    activation="swiglu",
    tie_embeddings=False,
  )
  axes = decoder.logical_axes()
  is_names = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  matches = jax.tree.map(lambda a, b: len(a) == b.ndim, axes, params, is_leaf=is_names)
  assert all(jax.tree.leaves(matches))


def test_stats_have_one_row_per_moe_layer_in_order(tokens):
  """Dropless top-1: each MoE layer keeps exactly one assignment per token."""
  decoder, params = make(num_layers=5)
  output = jax.jit(lambda p, t: decoder(p, t, train=True, key=jax.random.key(0)))(
    params, tokens
  )
  assert output.stats is not None
  assert output.stats.load.shape == (len(decoder.moe_layers), 4)
  np.testing.assert_array_equal(output.stats.load.sum(-1), [2 * S] * 2)
  assert set(output.aux) == set(decoder.aux_weights)


def test_bfloat16_trains(tokens):
  """Compute in bfloat16, logits and parameters in float32, finite gradients."""
  decoder, params = make({"dispatcher": "auto"}, dtype="bfloat16")
  # jax's own attention mixes dtypes in its backward pass; see layers/attention.py.
  with jax.numpy_dtype_promotion("standard"):
    _, gradient = loss_and_gradient(decoder, params, tokens)
  assert jax.eval_shape(decoder, params, tokens).logits.dtype == jnp.float32
  for leaf in jax.tree.leaves(gradient):
    assert leaf.dtype == jnp.float32 and bool(jnp.isfinite(leaf).all())


def test_hash_routing_reads_a_table_that_init_made():
  """Balanced by the counts given; an expert's load is that of its ids."""
  moe = MoEConfig(num_experts=4, hidden=8, router="hash")
  moe.use_router("hash", spread="balanced")
  moe.every, moe.offset, moe.capacity_factor = 1, 0, None
  model = ModelConfig(num_layers=1, width=8, num_heads=2, hidden=8)
  counts = np.array([90, 30, 30, 20, 10, 5, 5, 0])
  decoder = Decoder(model, moe, vocab_size=8, token_counts=lambda: counts)
  params = decoder.init(jax.random.key(0))
  table = np.asarray(params["hash_table"])[:, 0].astype(int)
  np.testing.assert_array_equal(
    np.sort(np.bincount(table, counts, minlength=4)), [30, 35, 35, 90]
  )
  tokens = jnp.asarray([[0, 0, 1, 2, 7, 3]], jnp.int32)
  stats = jax.jit(lambda p: decoder(p, tokens, train=True).stats)(params)
  assert stats is not None
  expected = np.bincount(table[np.asarray(tokens)[0]], minlength=4)
  np.testing.assert_array_equal(stats.load[0], expected)
