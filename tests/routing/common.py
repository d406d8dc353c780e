"""What the routing tests share: inputs, compiled routers, draws for the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.routing.base import RouterInputs, RouterOptions, Routing
from moejax.routing.registry import ROUTERS


@functools.cache
def compiled(name: str, options: RouterOptions):
  """The router, compiled once per name, options and input structure."""
  # Compiling is what these tests wait for, and at level 0 it takes two thirds.
  flags = {"xla_backend_optimization_level": 0}
  return jax.jit(lambda inputs: ROUTERS[name].fn(inputs, options), compiler_options=flags)


def route(name, logits, options, valid=None, key=None, **rest) -> Routing:
  """One group through a registered router."""
  logits = jnp.asarray(logits, jnp.float32)
  valid = np.ones(logits.shape[0], bool) if valid is None else valid
  inputs = RouterInputs(logits=logits, valid=jnp.asarray(valid), key=key, **rest)
  return compiled(name, options)(inputs)


def skewed_logits(seed: int, num_tokens: int, num_experts: int, skew=2.0) -> np.ndarray:
  """Random float32 logits whose first experts are favoured, so that they overflow."""
  rng = np.random.default_rng(seed)
  favour = skew * np.linspace(1, 0, num_experts)
  return (rng.normal(size=(num_tokens, num_experts)) + favour).astype(np.float32)


def token_order(key: jax.Array, num_tokens: int) -> np.ndarray:
  """The order that priority=random makes of this key."""
  tokens = jnp.arange(num_tokens, dtype=jnp.int32)
  return np.asarray(jax.random.permutation(key, tokens))
