"""Measures of the routers' health in a step: gradients and biases.

They are computed on the devices, since parameters and gradients stay there. The host
interprets them (`moejax.alarms`).

Letters: L MoE layers, R repeats of a unit, E experts.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config.pattern import Pattern
from moejax.models.decoder import Decoder
from moejax.models.per_layer import PARTS
from moejax.routing.router import Router
from moejax.types import Params, pytree

Measure = Callable[[Router, Params], Float[Array, "R"]]
"""A router, its parameters with a leading axis R -> one number for each repeat."""


@pytree
class RouterHealth:
  """One step's numbers, with an axis of the MoE layers in order."""

  gradient: Float[Array, "L"]
  """Root mean square of the gradient over a router's parameters; 0 without any, NaN if
  they are frozen."""
  other_gradient: Float[Array, ""]
  """The same over all trained parameters outside the routers."""
  bias_span: Float[Array, "L"]
  """Largest minus smallest selection bias; 0 for a router without one."""


def router_health(
  model: Decoder, params: Params, gradients: Params, norm: Float[Array, ""]
) -> RouterHealth:
  """Returns the health of a model's routers.

  Args:
    model: with at least one MoE layer.
    params: all parameters.
    gradients: of the trained ones, before clipping.
    norm: of all gradients. Not computed here again: another sum over all of them could
      change how the compiler fuses and so rounds the first.
  """
  squares = of_routers(model, gradients, _square)
  sizes = of_routers(model, gradients, _size)
  # A float: as an integer, the size of a large model would overflow int32.
  size = float(sum(g.size for g in jax.tree.leaves(gradients)))
  others = jnp.maximum(size - jnp.sum(sizes), 1.0)
  # Rounding may make this negative where the routers have nearly all of the norm.
  rest = jnp.maximum(jnp.square(norm) - jnp.sum(squares), 0.0)
  gradient, other = jnp.sqrt(squares / jnp.maximum(sizes, 1.0)), jnp.sqrt(rest / others)
  if model.frozen is not None:
    gradient = jnp.where(sizes > 0, gradient, jnp.nan)
    # Where only routers are trained, the rest is a rounding error.
    other = jnp.where(size > jnp.sum(sizes), other, jnp.nan)
  return RouterHealth(
    gradient=gradient,
    other_gradient=other,
    bias_span=of_routers(model, params, _span),
  )


def of_routers(model: Decoder, params: Params, measure: Measure) -> Float[Array, "L"]:
  """Measures the router of every MoE layer; 0 where it has no parameters.

  Args:
    model: with at least one MoE layer.
    params: its parameters, or a tree like them that may lack some.
    measure: of one router or of its repeats.
  """
  found = []
  for name, stack in model.stacks.items():
    if stack.moe_layers:
      below = params.get(name, {}) if name else params
      own = functools.partial(measure, stack.router)
      found += _of_stack(stack.pattern, below, own)
  return jnp.concatenate(found)


def _of_stack(
  pattern: Pattern, params: Params, measure: Callable[[Params], Float[Array, "R"]]
) -> list[Float[Array, "l"]]:
  """Returns the numbers of each part of a stack, its layers in order."""
  found = []
  for part in PARTS:
    repeats = pattern.repeats if part == "unit" else 1
    rows = []
    for index, is_moe in enumerate(getattr(pattern, part)):
      if not is_moe:
        continue
      own = params.get(part, {}).get(str(index), {}).get("moe", {}).get("router", {})
      if part != "unit":
        own = jax.tree.map(lambda leaf: leaf[None], own)
      rows.append(measure(own) if own else jnp.zeros(repeats, jnp.float32))
    if rows:
      found.append(jnp.stack(rows, axis=1).reshape(-1))
  return found


def _square(router: Router, params: Params) -> Float[Array, "R"]:
  del router
  sums = [
    jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(params)
  ]
  return jnp.sum(jnp.stack(sums), axis=0)


def _size(router: Router, params: Params) -> Float[Array, "R"]:
  del router
  leaves = jax.tree.leaves(params)
  repeats = leaves[0].shape[0]
  return jnp.full(repeats, sum(g.size for g in leaves) / repeats, jnp.float32)


def _span(router: Router, params: Params) -> Float[Array, "R"]:
  if router.selection_bias not in params:
    return jnp.zeros(jax.tree.leaves(params)[0].shape[0], jnp.float32)
  bias = params[router.selection_bias].astype(jnp.float32)
  return jnp.max(bias, axis=-1) - jnp.min(bias, axis=-1)
