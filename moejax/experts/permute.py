"""Moving rows between tokens and experts, forwards and backwards by gathers.

The transpose of a gather is a scatter-add, which is slow on every backend. Here
both directions of each move are known in advance (`place` is the inverse of
`assignment`), so each backward pass is also a gather.

Letters: T tokens, D width, K choices per token, N assignments, R rows in expert
order (slots, or sorted assignments, with some rows unused).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.types import pytree, static_field


@pytree
class Moves:
  """Which row serves which assignment, in both directions."""

  token: Int[Array, "N"]
  """The token of each assignment."""
  place: Int[Array, "N"]
  """The row of each assignment, in [0, R); arbitrary if not kept."""
  kept: Bool[Array, "N"]
  """Whether the assignment has a row."""
  assignment: Int[Array, "R"]
  """The assignment each row serves, in [0, N); arbitrary if unused."""
  used: Bool[Array, "R"]
  """Whether the row serves an assignment."""
  num_tokens: int = static_field()
  num_selected: int | None = static_field()
  """K if assignments are token-major; None requires a scatter-add."""


def take(array: Array, index: Int[Array, "I"]) -> Array:
  """Returns rows of `array`; every index must be in range."""
  return array.at[index].get(mode="promise_in_bounds")


def take_masked(array: Array, index: Int[Array, "I"], mask: Bool[Array, "I"]) -> Array:
  """Returns rows of `array`, zero where `mask` is False, for any index there."""
  # A select, not a product: an unused row may hold anything, including NaN.
  rows = take(array, jnp.clip(index, 0, array.shape[0] - 1))
  shape = mask.shape + (1,) * (array.ndim - 1)
  return jnp.where(mask.reshape(shape), rows, jnp.zeros((), array.dtype))


def sum_rows(
  rows: Float[Array, "R D"], gate: Float[Array, "N"] | None, moves: Moves
) -> Float[Array, "T D"]:
  """Sums (gate *) row over a token's kept assignments, in float32, rounded once."""
  t, k = moves.num_tokens, moves.num_selected

  def term(place: Array, kept: Array, gate: Array | None) -> Array:
    picked = take_masked(rows, place, kept).astype(jnp.float32)
    return picked if gate is None else picked * gate[:, None]

  if k is None:
    total = jnp.zeros((t, rows.shape[1]), jnp.float32)
    values = term(moves.place, moves.kept, gate)
    return total.at[moves.token].add(values, mode="promise_in_bounds").astype(rows.dtype)
  # One gather per choice fuses into one pass; one gather of all choices would first
  # write [T, K, D], and touching fresh memory is the main cost here.
  place, kept = moves.place.reshape(t, k), moves.kept.reshape(t, k)
  gates = None if gate is None else gate.reshape(t, k)
  total = term(place[:, 0], kept[:, 0], None if gates is None else gates[:, 0])
  for i in range(1, k):
    total += term(place[:, i], kept[:, i], None if gates is None else gates[:, i])
  return total.astype(rows.dtype)


def token_of_row(moves: Moves) -> Int[Array, "R"]:
  """Returns the token each row serves; arbitrary in [0, T) if unused."""
  return take(moves.token, jnp.clip(moves.assignment, 0, moves.token.shape[0] - 1))


@jax.custom_vjp
def to_rows(x: Float[Array, "T D"], moves: Moves) -> Float[Array, "R D"]:
  """Copies each assignment's token to its row; unused rows are zero."""
  return take_masked(x, token_of_row(moves), moves.used)


def _to_rows_forward(x: Array, moves: Moves) -> tuple[Array, Moves]:
  return to_rows(x, moves), moves


def _to_rows_backward(moves: Moves, grad: Array) -> tuple[Array, Any]:
  return sum_rows(grad, None, moves), None


to_rows.defvjp(_to_rows_forward, _to_rows_backward)


@jax.custom_vjp
def combine(
  rows: Float[Array, "R D"], gate: Float[Array, "N"], moves: Moves
) -> Float[Array, "T D"]:
  """Returns the sum over a token's kept assignments of gate * row."""
  return sum_rows(rows, gate, moves)


def _combine_forward(rows: Array, gate: Array, moves: Moves) -> tuple[Array, Any]:
  return combine(rows, gate, moves), (rows, gate, moves)


def _combine_backward(residuals: Any, dy: Array) -> tuple[Array, Array, Any]:
  rows, gate, moves = residuals
  d_row = take(dy, token_of_row(moves))
  gate_of_row = take_masked(gate, moves.assignment, moves.used)
  product = jnp.sum(rows.astype(jnp.float32) * d_row.astype(jnp.float32), axis=1)
  d_gate = take_masked(product, moves.place, moves.kept)
  d_rows = d_row.astype(jnp.float32) * gate_of_row[:, None]
  return d_rows.astype(rows.dtype), d_gate, None


combine.defvjp(_combine_forward, _combine_backward)


@jax.custom_vjp
def add_up(rows: Float[Array, "R D"], moves: Moves) -> Float[Array, "T D"]:
  """Returns the sum over a token's kept assignments of their already weighted rows."""
  return sum_rows(rows, None, moves)


def _add_up_forward(rows: Array, moves: Moves) -> tuple[Array, Moves]:
  return add_up(rows, moves), moves


def _add_up_backward(moves: Moves, dy: Array) -> tuple[Array, Any]:
  return take_masked(dy, token_of_row(moves), moves.used), None


add_up.defvjp(_add_up_forward, _add_up_backward)


@jax.custom_vjp
def gate_rows(gate: Float[Array, "N"], moves: Moves) -> Float[Array, "R"]:
  """Returns the gate of each row's assignment; zero if the row is unused."""
  return take_masked(gate, moves.assignment, moves.used)


def _gate_rows_forward(gate: Array, moves: Moves) -> tuple[Array, Moves]:
  return gate_rows(gate, moves), moves


def _gate_rows_backward(moves: Moves, grad: Array) -> tuple[Array, Any]:
  return take_masked(grad, moves.place, moves.kept), None


gate_rows.defvjp(_gate_rows_forward, _gate_rows_backward)
