"""Latent attention: two forms, one result, and the smaller of two caches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import ModelConfig
from moejax.layers.attend import Context, attention_mask
from moejax.layers.cache import empty_cache
from moejax.layers.latent_attention import LatentAttention
from moejax.models.shell import Shell
from tests.layers.test_attend import reference

B, S, H = 2, 5, 3
SIZES: dict[str, Any] = {
  "kv_rank": 12,
  "nope_head_dim": 6,
  "rope_head_dim": 4,
  "value_head_dim": 5,
}


def make(**fields):
  config = ModelConfig(num_heads=H, width=16, attention="latent", **SIZES, **fields)
  shell = Shell(lambda key: LatentAttention(config, nnx.Rngs(params=key)))
  params = shell.init(jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  noisy = [
    leaf + jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves
  ]
  return config, shell, jax.tree.unflatten(tree, noisy)


def make_context(length=S):
  segments = jnp.asarray([[1] * length, [1] * 2 + [2] * (length - 2)], jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (B, length))
  mask = attention_mask(segments, segments)
  return Context(positions=positions, mask=mask, segment_ids=segments)


X = jnp.asarray(np.random.default_rng(0).normal(size=(B, S, 16)), jnp.float32)


def test_equations_of_the_paper():
  """Equations 37 to 47 in float64, with the norms of the released code, by head."""
  _, shell, params = make(q_rank=7, rope_interleaved=True, attention_bias=True)
  context = make_context()
  got = jax.jit(lambda params: shell.merge(params)(X, context, None)[0])(params)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = np.asarray(X, np.float64)

  def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale

  def turn(x):  # [B, S, ..., 4]
    angle = np.arange(S).reshape(1, S, *[1] * (x.ndim - 2)) * np.array([1.0, 0.01])
    z = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack([z.real, z.imag], -1).reshape(x.shape)

  latent = norm(x @ p["query_down"] + p["query_down_bias"], p["query_norm"]["scale"])
  query = np.einsum("bsr,rha->bsha", latent, p["query_up"])
  query = np.concatenate([query[..., :6], turn(query[..., 6:])], -1)
  down = x @ p["kv_down"] + p["kv_down_bias"]
  latent, shared = norm(down[..., :12], p["kv_norm"]["scale"]), turn(down[..., 12:])
  up = np.einsum("bsr,rha->bsha", latent, p["kv_up"])
  shared = np.repeat(shared[:, :, None], H, 2)
  key, value = np.concatenate([up[..., :6], shared], -1), up[..., 6:]
  mixed = reference(query, key, value, context.mask, 10**-0.5, None)
  want = np.einsum("bshz,hzd->bsd", mixed, p["out"])
  np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("sinks", [False, True])
def test_absorbed_is_naive_in_value_and_gradient(sinks):
  """A product is associative; with sinks, which neither form moves."""
  _, shell, params = make(attention_sinks=sinks)
  context = make_context()

  def loss(params, x, form):
    layer = shell.merge(params)
    query, latent = layer._query(x, context), layer._latent(x, context)
    out = getattr(layer, form)(query, latent, context)
    return jnp.sum(jnp.sin(out)), out

  run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
  naive, absorbed = run(params, X, "naive"), run(params, X, "absorbed")
  for a, b in zip(jax.tree.leaves(naive), jax.tree.leaves(absorbed), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def test_one_token_is_absorbed_and_a_prompt_is_expanded():
  """The form with fewer products: of DeepSeek-V3's sizes, by hand.

  512 x 256 products expand a key and a value; a pair costs 1024 instead of 256 products
  in the absorbed form. One query over 4,096 keys: 4096*768 < 4095*512*256. 4,096 queries
  have nothing to gain.
  """
  sizes: dict[str, Any] = {
    "nope_head_dim": 128,
    "rope_head_dim": 64,
    "value_head_dim": 128,
  }
  config = ModelConfig(num_heads=1, width=8, attention="latent", kv_rank=512, **sizes)
  layer = nnx.eval_shape(lambda: LatentAttention(config, nnx.Rngs(0)))
  assert layer.is_absorbed(1, 4096)
  assert layer.is_absorbed(1, 2)
  assert not layer.is_absorbed(256, 4096)
  assert not layer.is_absorbed(4096, 4096)


def test_the_cache_is_the_latent_vector_and_the_shared_key():
  """(kv_rank + rope) numbers per token, whatever the number of heads."""
  config, _, _ = make()
  cache = jax.tree.leaves(empty_cache(config, 3, 7, 2))
  assert [leaf.shape for leaf in cache] == [(2, 3, 7, 12 + 4)]
