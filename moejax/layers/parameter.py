"""Parameters: declared on one line with their shape, axes and scale.

A layer is an `nnx.Module` only as a typed shell: it owns `nnx.Param`s and calls
pure functions on them. Models keep parameters as plain dicts and rebuild the
shell inside `jax.jit` with `nnx.merge`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

LogicalAxes = tuple[str | None, ...]


def matrix(
  rngs: nnx.Rngs,
  shape: tuple[int, ...],
  axes: LogicalAxes,
  *,
  fan_in: int,
  scale: float = 1.0,
  dtype: str = "float32",
) -> nnx.Param:
  """A weight drawn from a normal cut at two deviations, of std scale/sqrt(fan_in)."""
  # 0.8796 is the standard deviation of a unit normal cut at two of its own.
  deviation = scale / (0.87962566103423978 * fan_in**0.5)
  value = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
  return _declare((value * deviation).astype(dtype), axes)


def constant(
  value: float, shape: tuple[int, ...], axes: LogicalAxes, *, dtype: str = "float32"
) -> nnx.Param:
  """A parameter that starts at one value: norm scales (1), biases (0)."""
  return _declare(jnp.full(shape, value, dtype), axes)


def _declare(value: Array, axes: LogicalAxes) -> nnx.Param:
  assert value.ndim == len(axes), (value.shape, axes)
  return nnx.Param(value, logical_axes=axes)


def logical_axes(module: nnx.Module) -> dict[str, Any]:
  """The declared axes of every parameter, as a plain nested dict."""
  state = nnx.state(module)
  axes = jax.tree.map(
    lambda variable: variable.get_metadata()["logical_axes"],
    state,
    is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
  )
  return nnx.to_pure_dict(axes)
