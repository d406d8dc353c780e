"""Moving rows between tokens and experts, forwards and backwards by gathers.

The transpose of a gather is a scatter-add, which is slow on every backend. Here
both directions of each move are known beforehand (`place` is the inverse of
`assignment`), so each gets a backward that is a gather again.

Letters: T tokens, D width, K choices per token, N assignments, R rows in the
experts' order (slots, or sorted assignments, with some rows unused).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.types import pytree, static_field


@pytree
class Moves:
  """Which row serves which assignment, both ways round."""

  token: Int[Array, "N"]
  """The token of each assignment."""
  place: Int[Array, "N"]
  """Its row, in [0, R); anything where not kept."""
  kept: Bool[Array, "N"]
  """Whether it has a row at all."""
  assignment: Int[Array, "R"]
  """The assignment each row serves, in [0, N); anything where unused."""
  used: Bool[Array, "R"]
  """Whether the row serves one."""
  num_tokens: int = static_field()
  num_selected: int | None = static_field()
  """K where assignments are token-major; None leaves only the scatter-add."""


def take(array: Array, index: Int[Array, "I"]) -> Array:
  """Rows of `array`; the caller knows that every index is in range."""
  return array.at[index].get(mode="promise_in_bounds")


def _masked_rows(array: Array, index: Int[Array, "I"], mask: Bool[Array, "I"]) -> Array:
  # A select, not a product: an unused row may hold anything, NaN included.
  shape = (mask.shape[0],) + (1,) * (array.ndim - 1)
  rows = take(array, jnp.clip(index, 0, array.shape[0] - 1))
  return jnp.where(mask.reshape(shape), rows, jnp.zeros((), array.dtype))


def sum_over_choices(values: Float[Array, "N D"], moves: Moves) -> Float[Array, "T D"]:
  """Adds each token's assignments; the float32 sum is rounded once."""
  t, k = moves.num_tokens, moves.num_selected
  wide = values.astype(jnp.float32)
  if k is not None:
    return jnp.sum(wide.reshape(t, k, -1), axis=1).astype(values.dtype)
  total = jnp.zeros((t, values.shape[1]), jnp.float32)
  return total.at[moves.token].add(wide, mode="promise_in_bounds").astype(values.dtype)


@jax.custom_vjp
def to_rows(x: Float[Array, "T D"], moves: Moves) -> Float[Array, "R D"]:
  """Copies each assignment's token to its row; unused rows are zero."""
  token = take(moves.token, jnp.clip(moves.assignment, 0, moves.token.shape[0] - 1))
  return _masked_rows(x, token, moves.used)


def _to_rows_forward(x: Array, moves: Moves) -> tuple[Array, Moves]:
  return to_rows(x, moves), moves


def _to_rows_backward(moves: Moves, grad: Array) -> tuple[Array, Any]:
  picked = _masked_rows(grad, moves.place, moves.kept)
  return sum_over_choices(picked, moves), None


to_rows.defvjp(_to_rows_forward, _to_rows_backward)


@jax.custom_vjp
def from_rows(rows: Float[Array, "R D"], moves: Moves) -> Float[Array, "N D"]:
  """Each assignment's row; zero where it has none."""
  return _masked_rows(rows, moves.place, moves.kept)


def _from_rows_forward(rows: Array, moves: Moves) -> tuple[Array, Moves]:
  return from_rows(rows, moves), moves


def _from_rows_backward(moves: Moves, grad: Array) -> tuple[Array, Any]:
  return _masked_rows(grad, moves.assignment, moves.used), None


from_rows.defvjp(_from_rows_forward, _from_rows_backward)


def combine(
  rows: Float[Array, "R D"], gate: Float[Array, "N"], moves: Moves
) -> Float[Array, "T D"]:
  """Sum over a token's kept assignments of gate * row."""
  picked = from_rows(rows, moves)
  weighted = picked.astype(jnp.float32) * gate[:, None]
  return sum_over_choices(weighted, moves).astype(rows.dtype)
