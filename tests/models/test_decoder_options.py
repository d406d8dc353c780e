"""Norm placement, multipliers, soft cap, padded vocabulary, lists of dense layers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.config import Config, ModelConfig, MoEConfig
from moejax.config.check import validate
from moejax.config.pattern import fold, layer_pattern
from moejax.cost.parameters import count_parameters
from moejax.errors import ConfigError
from moejax.evaluate import decoding
from moejax.models.decoder import Decoder
from moejax.models.loss import cross_entropy

V, S = 21, 10
SIZES: dict[str, Any] = {"num_layers": 3, "width": 16, "num_heads": 2, "hidden": 24}
MOE: dict[str, Any] = {
  "num_experts": 4,
  "num_selected": 2,
  "hidden": 12,
  "router": "top_k",
  "capacity_factor": None,
}
OPTIONS: dict[str, dict[str, Any]] = {
  "post": {"norm_placement": "post"},
  "both": {"norm_placement": "both", "logits_soft_cap": 2.0},
  "granite": {
    "embedding_scale": 3.0,
    "residual_scale": 0.6,
    "logits_divisor": 1.7,
    "activation": "swiglu",
  },
}


def make(moe: dict[str, Any] | None = None, **model) -> Decoder:
  config, experts = ModelConfig(**SIZES | model), MoEConfig(**MOE | (moe or {}))
  return Decoder(config, experts, vocab_size=V)


def init(model: Decoder) -> Any:
  """Parameters, none of which is at its default: norms start at one."""
  params = model.init(jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noise = (0.3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves))
  return jax.tree.unflatten(tree, [a + n for a, n in zip(leaves, noise)])


IDS = jax.random.randint(jax.random.key(2), (2, S), 0, V)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_residual_stream_is_as_written(name):
  """Layer by layer: x + scale * post(branch(pre(x))), from the parts of the blocks."""
  model = make(scan_layers=False, **OPTIONS[name])
  params, config = init(model), model.config

  def norm(x, block, which):
    if which not in block:
      return x
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(mean + config.norm_eps) * block[which]["scale"][None, None]

  def by_hand(params):
    from moejax.layers.attend import Context, attention_masks

    segments = jnp.ones_like(IDS)
    positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), IDS.shape)
    masks = attention_masks(config, segments, segments)
    context = Context(positions=positions, segment_ids=segments, **masks)
    x = params["embedding"]["table"][IDS] * config.embedding_scale
    blocks = [(params["unit"][str(i)], bool(i)) for i in range(2)]
    blocks = [(jax.tree.map(lambda a: a[0], p), is_moe) for p, is_moe in blocks]
    blocks += [(params["suffix"]["0"], False)]
    for block, is_moe in blocks:
      layer = model.stacks[""]._blocks[is_moe].merge(block)
      mixed, _ = layer.attention(norm(x, block, "attention_norm"), context, None)
      x = x + config.residual_scale * norm(mixed, block, "attention_post_norm")
      inner = norm(x, block, "feed_forward_norm")
      if is_moe:
        valid = jnp.ones(IDS.shape, bool)
        y, _ = layer.moe(inner, valid, IDS, key=None, train=False, capacity_factor=None)
      else:
        y = layer.feed_forward(inner)
      x = x + config.residual_scale * norm(y, block, "feed_forward_post_norm")
    logits = norm(x, params["embedding"], "norm") @ params["embedding"]["table"].T
    logits = logits / config.logits_divisor
    if config.logits_soft_cap is not None:
      logits = config.logits_soft_cap * jnp.tanh(logits / config.logits_soft_cap)
    return logits

  def both(params):
    def loss(function):
      return lambda p: jnp.mean(cross_entropy(function(p), IDS))

    ours = jax.value_and_grad(loss(lambda p: model(p, IDS).logits))(params)
    theirs = jax.value_and_grad(loss(by_hand))(params)
    return ours, theirs

  (ours, d_ours), (theirs, d_theirs) = jax.jit(both)(params)
  assert ours == pytest.approx(float(theirs), rel=1e-5)
  for one, other in zip(jax.tree.leaves(d_ours), jax.tree.leaves(d_theirs), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-3)


def test_a_padded_vocabulary_changes_no_prediction():
  """Rows 21 to 23 exist, have probability zero and no gradient, and are never sampled."""
  plain, padded = make(), make(vocab_multiple=8)
  params = init(padded)
  assert params["embedding"]["table"].shape[0] == 24
  own = {**params, "embedding": dict(params["embedding"])}
  own["embedding"]["table"] = params["embedding"]["table"][:V]

  def loss(model):
    return lambda p: jnp.mean(cross_entropy(model(p, IDS).logits, IDS))

  value, grads = jax.jit(jax.value_and_grad(loss(padded)))(params)
  wanted, wanted_grads = jax.jit(jax.value_and_grad(loss(plain)))(own)
  assert value == pytest.approx(float(wanted), rel=1e-6)
  table = grads["embedding"]["table"]
  np.testing.assert_array_equal(table[V:], 0)
  np.testing.assert_allclose(
    table[:V], wanted_grads["embedding"]["table"], atol=1e-6, rtol=1e-4
  )
  logits = jax.jit(padded)(params, IDS).logits
  assert logits.shape[-1] == 24 and bool(jnp.all(logits[..., V:] == -jnp.inf))
  positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), IDS.shape)
  cache = decoding._empty_cache(padded, 2, S)
  last, _ = jax.eval_shape(
    lambda p, c: decoding._prefill(padded, p, IDS, positions, c), params, cache
  )
  assert last.shape == (2, V)


@given(st.lists(st.booleans(), min_size=1, max_size=12).map(tuple))
def test_a_fold_is_of_these_layers_and_no_longer(kinds):
  """Prefix, repeats of the unit and suffix spell the layers; a unit occurs twice."""
  pattern = fold(kinds)
  assert pattern.is_moe == kinds
  blocks = len(pattern.prefix) + len(pattern.unit) + len(pattern.suffix)
  assert blocks <= len(kinds) and pattern.repeats != 1
  if len(kinds) > 1 and len(set(kinds)) == 1:
    assert blocks == 1


def test_dense_layers_are_those_listed():
  """They are dense beside those of `every`; a regular rest is still one scan."""
  moe = MoEConfig(every=1, offset=0, dense_layers="0, 3")
  assert layer_pattern(8, moe).is_moe == (False, True, True, False, *[True] * 4)
  assert layer_pattern(8, moe).repeats > 1
  one = make({"every": 1, "offset": 0, "dense_layers": "0,2"}, num_layers=6)
  other = make(
    {"every": 1, "offset": 0, "dense_layers": "0,2"}, num_layers=6, scan_layers=False
  )
  assert one.moe_layers == (1, 3, 4, 5)
  params = init(one)
  logits = [jax.jit(lambda p, m=m: m(p, IDS).logits)(params) for m in (one, other)]
  np.testing.assert_allclose(*logits, atol=1e-5)


@pytest.mark.parametrize(
  ("model", "moe"),
  [
    ({"norm_placement": "both"}, {}),
    ({"norm_placement": "post"}, {"expert_bias": True, "router_bias": True}),
    ({"activation": "geglu", "vocab_multiple": 8}, {"activation": "relu"}),
    ({}, {"activation": "swiglu", "num_shared": 1, "expert_bias": True}),
    ({"tie_embeddings": False, "vocab_multiple": 8}, {"dense_layers": "1", "every": 1}),
    ({"activation": "relu"}, {"activation": "geglu", "dense_twin": True}),
  ],
)
def test_the_count_is_that_of_the_tree(model, moe):
  """Closed formulas against every parameter of the model."""
  config = Config(model=ModelConfig(**SIZES | model), moe=MoEConfig(**MOE | moe))
  decoder = Decoder(config.model, config.moe, vocab_size=V)
  total, active = count_parameters(config, V)
  leaves = jax.tree.leaves(decoder.shapes())
  assert total["total"] == sum(math.prod(leaf.shape) for leaf in leaves)
  axes = jax.tree.leaves(decoder.logical_axes(), is_leaf=lambda a: isinstance(a, tuple))
  unused = sum(
    math.prod(leaf.shape) * 2 // 4
    for leaf, names in zip(leaves, axes)
    if "expert" in names
  )
  assert active["total"] == total["total"] - unused


@pytest.mark.parametrize(
  ("moe", "words"),
  [
    ({"dense_layers": "a"}, "is not a list of layers"),
    ({"dense_layers": "0,9"}, "no layer 9"),
    ({"dense_layers": "1"}, "makes no layer an MoE layer"),
    ({"router_bias": True, "router": "hash", "num_selected": 1}, "router_bias"),
  ],
)
def test_what_cannot_be_is_refused(moe, words):
  """A list that is none, a layer that is not there, a bias nobody adds."""
  config = Config(model=ModelConfig(**SIZES), moe=MoEConfig(**MOE | moe))
  with pytest.raises(ConfigError, match=words):
    validate(config)
