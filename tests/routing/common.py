"""What the routing tests share: inputs, compiled routers, draws for the oracle."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from moejax.routing import registry
from moejax.routing.base import RouterInputs, Routing, SlotPolicy
from moejax.routing.registry import ROUTERS
from moejax.routing.router import Router


def made(name: str, **options) -> tuple[Router, SlotPolicy]:
  """A router and a policy, of options of either."""
  own = registry.options_by_name(name)
  router = registry.make(name, {n: v for n, v in options.items() if n in own})
  return router, SlotPolicy(**{n: v for n, v in options.items() if n not in own})


def all_options(router: Router, policy: SlotPolicy) -> types.SimpleNamespace:
  """Both together, as the oracle reads them."""
  return types.SimpleNamespace(**dataclasses.asdict(policy), **dataclasses.asdict(router))


@functools.cache
def compiled(router: Router, policy: SlotPolicy):
  """The router, compiled once per options, policy and input structure."""
  # Compiling is what these tests wait for, and at level 0 it takes two thirds.
  flags = {"xla_backend_optimization_level": 0}
  return jax.jit(lambda inputs: router(inputs, policy), compiler_options=flags)


def route(router, logits, policy, valid=None, key=None, **rest) -> Routing:
  """One group through a router, which may be named."""
  router = ROUTERS[router]() if isinstance(router, str) else router
  logits = jnp.asarray(logits, jnp.float32)
  valid = np.ones(logits.shape[0], bool) if valid is None else valid
  inputs = RouterInputs(logits=logits, valid=jnp.asarray(valid), key=key, **rest)
  return compiled(router, policy)(inputs)


def skewed_logits(seed: int, num_tokens: int, num_experts: int, skew=2.0) -> np.ndarray:
  """Random float32 logits whose first experts are favoured, so that they overflow."""
  rng = np.random.default_rng(seed)
  favour = skew * np.linspace(1, 0, num_experts)
  return (rng.normal(size=(num_tokens, num_experts)) + favour).astype(np.float32)


def token_order(key: jax.Array, num_tokens: int) -> np.ndarray:
  """The order that priority=random makes of this key."""
  tokens = jnp.arange(num_tokens, dtype=jnp.int32)
  return np.asarray(jax.random.permutation(key, tokens))
