"""The gates of a router on the same tokens, before and after an operation.

The router is run to see how its gates change: whether copies share a gate, what the gates
of a token sum to, whether more choices change the other gates. So no operation depends on
the kind of router.

Letters: T tokens, D width, E experts, K choices per token.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, Shaped

from moejax.config import MoEConfig
from moejax.config.router import make_router
from moejax.layers.router import RouterLayer
from moejax.models.shell import Shell
from moejax.routing.placement import Assignments

NUM_TOKENS = 64
"""T: random tokens of unit variance, as after a norm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gates:
  """Gates of all experts for each token, zero for experts that it did not choose."""

  moe: MoEConfig
  """Config of the layer afterwards."""
  before: Float[np.ndarray, "T E"] | None
  """None for a dense layer, or a router whose slots hold mixtures of tokens."""
  after: Float[np.ndarray, "T e"] | None


def gates(
  moe: MoEConfig,
  width: int,
  params: Mapping[str, Shaped[np.ndarray, "..."]],
  table: Int[np.ndarray, "V K"] | None = None,
) -> Float[np.ndarray, "T E"] | None:
  """Returns the gates that a router gives to random tokens in evaluation, dropless.

  Args:
    moe: config of the layer.
    width: D.
    params: the router's arrays, by name.
    table: table of a router that has one.

  Returns:
    Gates, zero where an expert was not chosen; None if experts do not get whole tokens.
  """
  router = make_router(moe)
  if router.mixes:
    return None
  tokens = np.random.default_rng(0).standard_normal((1, NUM_TOKENS, width))
  assigned = None
  if table is not None:
    assigned = jnp.asarray(table[np.arange(NUM_TOKENS) % len(table)][None], jnp.int32)
  placement = _runner(_Key(width=width, text=repr(moe), moe=moe))(
    {name: jnp.asarray(value) for name, value in params.items()},
    jnp.asarray(tokens, jnp.float32),
    assigned,
  )
  if not isinstance(placement, Assignments):
    return None
  out = np.zeros((NUM_TOKENS, moe.fine_experts))
  kept = np.asarray(placement.kept[0])
  where = np.asarray(placement.token[0])[kept], np.asarray(placement.expert[0])[kept]
  np.add.at(out, where, np.asarray(placement.gate[0], np.float64)[kept])
  return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Key:
  """A router's config as a cache key, which a config itself cannot be."""

  width: int
  text: str
  moe: MoEConfig = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=8)
def _runner(key: _Key) -> Any:
  """Returns a compiled router, one for all layers."""
  moe = key.moe
  shell = Shell(lambda rng: RouterLayer(key.width, moe, nnx.Rngs(params=rng)))
  factor = None
  if make_router(moe).needs_capacity:
    factor = moe.eval_capacity_factor or moe.capacity_factor

  def run(params: Any, tokens: Any, assigned: Any) -> Any:
    valid = jnp.ones(tokens.shape[:2], bool)
    ids = jnp.zeros(tokens.shape[:2], jnp.int32)
    _, routing = shell.merge(params)(
      *(tokens, valid, ids, assigned), key=None, capacity_factor=factor
    )
    return routing.placement

  return jax.jit(run)


def initial_router(moe: MoEConfig, width: int, seed: int) -> dict[str, np.ndarray]:
  """Returns newly initialised arrays of a router, by name."""
  shell = Shell(lambda key: RouterLayer(width, moe, nnx.Rngs(params=key)))
  return jax.tree.map(np.asarray, shell.init(jax.random.key(seed)))
