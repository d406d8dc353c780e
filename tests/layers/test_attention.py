"""Multi-head attention with its options, against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import ModelConfig
from moejax.layers.attend import Context, attention_mask
from moejax.layers.attention import Attention
from moejax.models.shell import Shell
from tests.layers.test_attend import reference

B, S, D, H, J, A = 2, 5, 12, 4, 2, 3


@pytest.mark.parametrize("scope", ["head", "width"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_bias_then_norm_then_clip_then_attention(scope, clip):
  """The order of OLMoE; positions are all 0, so nothing turns (A is odd, and 2 of it do).

  By the parameters themselves: biases, norms, the clip that cuts some and not all, the
  scale of the logits, sinks, and a bias at the end.
  """
  config = ModelConfig(
    num_heads=H,
    num_kv_heads=J,
    width=D,
    head_dim=A,
    rope_fraction=0.7,
    qk_norm=True,
    qk_norm_scope=scope,
    clip_qkv=clip,
    attention_bias=True,
    attention_out_bias=True,
    attention_sinks=True,
    attention_scale=0.9,
  )
  shell = Shell(lambda key: Attention(config, nnx.Rngs(params=key)))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: a + jnp.asarray(0.4 * rng.normal(size=a.shape), a.dtype),
    shell.init(jax.random.key(0)),
  )
  x = rng.normal(size=(B, S, D))
  segments = jnp.asarray([[1] * S, [1, 1, 2, 2, 0]], jnp.int32)
  mask = attention_mask(segments, segments)
  context = Context(
    positions=jnp.zeros((B, S), jnp.int32), mask=mask, segment_ids=segments
  )
  got = jax.jit(lambda params, x: shell.merge(params)(x, context, None)[0])(
    params, jnp.asarray(x, jnp.float32)
  )

  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

  def project(name):
    return np.einsum("bsd,dha->bsha", x, p[name]) + p[f"{name}_bias"]

  def norm(y, scale):
    flat = y if scope == "head" else y.reshape(B, S, -1)
    root = np.sqrt(np.mean(flat**2, -1, keepdims=True) + 1e-6)
    return (flat / root * scale).reshape(y.shape)

  query = norm(project("query"), p["query_norm"]["scale"])
  key = norm(project("key"), p["key_norm"]["scale"])
  value = project("value")
  if clip is not None:
    assert all(0.1 < np.mean(np.abs(a) > clip) < 0.9 for a in (query, key, value))
    query, key, value = (np.clip(a, -clip, clip) for a in (query, key, value))
  mixed = reference(query, key, value, mask, 0.9, p["sinks"])
  want = np.einsum("bsha,had->bsd", mixed, p["out"]) + p["out_bias"]
  np.testing.assert_allclose(got, want, atol=1e-5)
