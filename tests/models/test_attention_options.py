"""Attention's options in a whole model: every way of running it gives one result."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import Config, MeshConfig, ModelConfig, MoEConfig
from moejax.config.attention import layer_windows
from moejax.config.pattern import layer_pattern
from moejax.models.decoder import Decoder
from moejax.models.per_layer import windowed_by_part
from moejax.models.placement import param_shardings
from moejax.sharding import rules
from moejax.sharding.mesh import make_mesh
from tests.models import test_decoder
from tests.models.test_decoder import S, input_gradients

V = 24
PREFIXED: dict[str, Any] = {**test_decoder.MOE, "dense_prefix": 1}
EVERY: dict[str, Any] = {**test_decoder.MOE, "every": 1, "offset": 0}

LATENT: dict[str, Any] = {
  "attention": "latent",
  "kv_rank": 12,
  "nope_head_dim": 6,
  "rope_head_dim": 4,
  "value_head_dim": 5,
  "rope_interleaved": True,
}
YARN: dict[str, Any] = {
  "rope_scaling": "yarn",
  "rope_factor": 4.0,
  "rope_original": 64,
}
BOTH = pytest.mark.parametrize(
  "name", ["gpt_oss", pytest.param("deepseek_v3", marks=pytest.mark.slow)]
)
OPTIONS: dict[str, dict[str, Any]] = {
  "olmoe": {"qk_norm": True, "qk_norm_scope": "width", "clip_qkv": 0.8},
  "glm": {"rope_fraction": 0.5, "attention_bias": True, "num_kv_heads": 2},
  "gpt_oss": {
    "num_kv_heads": 2,
    "attention_bias": True,
    "attention_out_bias": True,
    "attention_sinks": True,
    "sliding_window": 3,
    "window_pattern": "sliding,full",
    **YARN,
    "rope_truncate": False,
  },
  "deepseek_v2_lite": LATENT,
  "deepseek_v3": LATENT | YARN | {"q_rank": 10, "rope_mscale_all_dim": 1.0},
}


def make(name: str, **changes: Any):
  """A model of five layers, a dense one and two units of two, with no vector at rest."""
  fields: dict[str, Any] = {
    "num_layers": 5,
    "width": 16,
    "num_heads": 4,
    "hidden": 32,
  }
  config = ModelConfig(**fields | OPTIONS[name] | changes)
  moe = MoEConfig(**PREFIXED)
  decoder = Decoder(config, moe, vocab_size=V)
  params = jax.jit(decoder.init)(jax.random.key(0))
  rng = np.random.default_rng(0)

  def move(leaf: Any) -> Any:
    return leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype)

  return decoder, jax.tree.map(move, params)


@pytest.fixture(scope="module", params=OPTIONS)
def model(request):
  return request.param, *make(request.param)


TOKENS = jax.random.randint(jax.random.key(1), (2, S), 0, V)


def test_cached_and_uncached_logits_agree(model):
  """A prompt at once, then token by token, equals the whole sequence at once."""
  _, decoder, params = model
  full = jax.jit(decoder)(params, TOKENS).logits
  run = jax.jit(lambda p, t, c: decoder(p, t, cache=c))
  output = run(params, TOKENS[:, :4], decoder.init_cache(2, S + 2))
  pieces = [output.logits]
  for index in range(4, S):
    output = run(params, TOKENS[:, index : index + 1], output.cache)
    pieces.append(output.logits)
  np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, atol=5e-5)


def test_documents_packed_in_a_row_get_the_logits_they_get_alone(model):
  """Packing is invisible under every option."""
  _, decoder, params = model
  segments = jnp.asarray([[1] * 4 + [2] * 6, [1] * S], jnp.int32)
  positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], list(range(S))], jnp.int32)
  run = jax.jit(
    lambda p, t, s=None, i=None: decoder(p, t, segment_ids=s, positions=i).logits
  )
  packed = run(params, TOKENS, segments, positions)
  alone = run(params, TOKENS[:1, 4:])
  np.testing.assert_allclose(packed[:1, 4:], alone, atol=5e-5)


def loss_and_gradient(decoder, params, tokens=TOKENS):
  def loss(params):
    output = decoder(params, tokens, train=True, key=jax.random.key(4))
    return jnp.mean(jnp.square(output.logits)) + output.aux["balance_loss"]

  return jax.jit(jax.value_and_grad(loss))(params)


def same(a, b, atol=2e-6):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=atol, rtol=2e-4)


@BOTH
def test_scanned_unrolled_and_recomputed_models_are_the_same(name):
  """A window that a scanned index chooses is the one that the layer has unrolled."""
  decoder, params = make(name)
  expected = loss_and_gradient(decoder, params)
  for change in ({"scan_layers": False}, {"remat": "full"}):
    other, _ = make(name, **change)
    same(loss_and_gradient(other, params), expected)


@pytest.mark.parametrize(
  "name", ["gpt_oss", "deepseek_v3", pytest.param("olmoe", marks=pytest.mark.slow)]
)
def test_a_mesh_changes_nothing(name):
  """Heads over `tensor`, width over `fsdp`: loss and gradients of one device."""
  decoder, params = make(name)
  tokens = jnp.concatenate([TOKENS, TOKENS[:, ::-1]])
  expected = loss_and_gradient(decoder, params, tokens)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  sharded = jax.device_put(params, param_shardings(decoder, mesh))
  with jax.set_mesh(mesh):
    got = loss_and_gradient(
      decoder, sharded, jax.device_put(tokens, rules.batch_sharding(mesh))
    )
  same(got, expected, atol=1e-5)


@pytest.mark.parametrize(("first", "seen"), [("sliding", 3), ("full", S - 2)])
def test_a_layer_sees_its_window_or_all_before(first, seen):
  """By gradients of a model of one layer, the first of a pattern; the window is 3."""
  config = ModelConfig(
    num_layers=1,
    width=16,
    num_heads=2,
    hidden=32,
    sliding_window=3,
    window_pattern=f"{first},full,sliding",
    tie_embeddings=False,
  )
  decoder = Decoder(config, MoEConfig(**EVERY), vocab_size=V)
  params = decoder.init(jax.random.key(0))
  gradients = input_gradients(decoder, params, TOKENS, None, 0, S - 3)
  assert int((gradients[0] > 0).sum()) == seen


@pytest.mark.parametrize("layers", [1, 2, 5, 8])
def test_the_blocks_of_the_stack_have_the_windows_of_their_layers(layers):
  """Prefix, then the repeats one after the other, then suffix, against the pattern."""
  config = ModelConfig(
    num_layers=layers, sliding_window=4, window_pattern="sliding,full,full"
  )
  pattern = layer_pattern(layers, MoEConfig(every=2, dense_prefix=1))
  parts = windowed_by_part(config, pattern)
  unit = [parts["unit"][name] for name in sorted(parts["unit"])]
  in_order = [
    *(parts["prefix"][name] for name in sorted(parts["prefix"])),
    *(block[repeat] for repeat in range(pattern.repeats) for block in unit),
    *(parts["suffix"][name] for name in sorted(parts["suffix"])),
  ]
  assert [4 * bool(w) for w in in_order] == [4, 0, 0, 4, 0, 0, 4, 0][:layers]
  assert layer_windows(config) == (4, 0, 0, 4, 0, 0, 4, 0)[:layers]


@BOTH
def test_bfloat16_trains(name):
  """Finite float32 gradients, close to those of float32."""
  decoder, params = make(name, dtype="bfloat16", num_layers=3)
  with jax.numpy_dtype_promotion("standard"):
    value, gradient = loss_and_gradient(decoder, params)
  exact, _ = loss_and_gradient(make(name, num_layers=3)[0], params)
  np.testing.assert_allclose(value, exact, rtol=0.05)
  for leaf in jax.tree.leaves(gradient):
    assert leaf.dtype == jnp.float32 and bool(jnp.isfinite(leaf).all())


def test_defaults_are_what_they_were():
  """No option is on: parameter names of attention, as checkpoints have them."""
  config = Config()
  decoder = Decoder(config.model, config.moe, vocab_size=V)
  assert set(decoder.shapes()["unit"]["0"]["attention"]) == {
    "query",
    "key",
    "value",
    "out",
  }
