"""Parameters, declared with their shape, axes and scale.

A layer is an `nnx.Module` only as a typed shell: it owns `nnx.Param`s and calls
pure functions on them. Models keep parameters as plain dicts and rebuild the
shell inside `jax.jit` with `nnx.merge`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from moejax.sharding.rules import LogicalAxes


def matrix(
  rngs: nnx.Rngs,
  shape: tuple[int, ...],
  axes: LogicalAxes,
  *,
  fan_in: int,
  scale: float = 1.0,
  dtype: str = "float32",
  trained: bool = True,
) -> nnx.Param:
  """Returns a weight from a normal truncated at 2 sigma, of std scale/sqrt(fan_in)."""
  # 0.8796 is the standard deviation of a unit normal truncated at +-2.
  deviation = scale / (0.87962566103423978 * fan_in**0.5)
  value = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
  return _declare((value * deviation).astype(dtype), axes, trained)


def constant(
  value: float,
  shape: tuple[int, ...],
  axes: LogicalAxes,
  *,
  dtype: str = "float32",
  trained: bool = True,
) -> nnx.Param:
  """Returns a parameter filled with one value: norm scales (1), biases (0).

  Args:
    trained: False excludes it from gradients and the optimizer.
  """
  return _declare(jnp.full(shape, value, dtype), axes, trained)


def _declare(value: Array, axes: LogicalAxes, trained: bool) -> nnx.Param:
  assert value.ndim == len(axes), (value.shape, axes)
  return nnx.Param(value, logical_axes=axes, trained=trained)


def logical_axes(module: nnx.Module) -> dict[str, Any]:
  """Returns the declared axes of every parameter, as a plain nested dict."""
  return _declared(module, "logical_axes")


def trained(module: nnx.Module) -> dict[str, Any]:
  """Returns whether each parameter is trained, as a plain nested dict."""
  return _declared(module, "trained")


def _declared(module: nnx.Module, what: str) -> dict[str, Any]:
  values = jax.tree.map(
    lambda variable: variable.get_metadata()[what],
    nnx.state(module),
    is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
  )
  return nnx.to_pure_dict(values)
