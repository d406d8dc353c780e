"""The experts on CPU: one loop per block size, only over rows that exist.

XLA:CPU has no ragged matmul (its `ragged_dot` multiplies every row by every expert),
and a batched matmul wastes work on empty slots. A loop of plain matmuls, with weights
selected by a dynamic index, is nearly as fast as one large matmul from 64 rows on;
docs/speed.md has the measurements.

Tokens are gathered inside the loop, so no permuted copy of x exists. The backward
pass is written by hand: it saves only the hidden pre-activations, needs no expert
output for the gate (d gate = <act(h), g W_out^T> + <b_out, g>), and moves rows by
gathers.

Letters: T tokens (all groups), D width, E experts, F expert hidden width, N
assignments, Z rows of a block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import parts
from moejax.experts import permute
from moejax.experts.blocks import Blocks
from moejax.experts.weights import ExpertWeights, activate
from moejax.types import pytree, static_field


@pytree
class Sorted:
  """The assignments of all groups in expert order."""

  moves: permute.Moves
  """Rows are assignments in expert order, kept ones first: R = N."""
  blocks: Blocks
  activation: str = static_field()


class _Block(NamedTuple):
  """Consecutive rows of one expert."""

  expert: Int[Array, ""]
  start: Int[Array, ""]
  """Index of the first row; of the Z rows from there, those `used` are the block's."""
  used: Bool[Array, "Z"]
  first: Bool[Array, ""]
  """Whether this is the expert's first block."""
  row: Int[Array, "Z"]
  """Row indices. Padding repeats the last one, so that it stays within the expert."""


def _over_blocks(blocks: Blocks, body: Callable[[_Block, Any], Any], carry: Any) -> Any:
  """Runs body(block, carry) over all blocks, one loop per size."""
  for z, size in enumerate(blocks.sizes):
    offset = jnp.arange(size, dtype=jnp.int32)

    def step(m: Array, carry: Any, offset: Array = offset) -> Any:
      start, count = blocks.position[m], blocks.count[m]
      row = start + jnp.minimum(offset, count - 1)
      block = _Block(blocks.expert[m], start, offset < count, blocks.first[m], row)
      return body(block, carry)

    carry = jax.lax.fori_loop(blocks.bound[z], blocks.bound[z + 1], step, carry)
  return carry


def _pick(stack: Array, index: Array) -> Array:
  return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)


def _zeros(shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
  """Returns zeros that vary over the same mesh axes as `like`, as loop carries must."""
  # Deriving the scalar from `like` works in every supported jax version, whose names for
  # these axes differ.
  zero = jnp.zeros_like(like[:1].reshape(-1)[0], dtype)
  return jnp.broadcast_to(zero, shape)


def _rows_buffer(arrays: Sorted, *shape: int, dtype: Any, like: Array) -> Array:
  """Returns a buffer of rows, with room for the padding of the last block."""
  num_rows = arrays.moves.assignment.shape[0] + arrays.blocks.sizes[0]
  return _zeros((num_rows, *shape), dtype, like)


def _read(buffer: Array, block: _Block) -> Array:
  return jax.lax.dynamic_slice_in_dim(buffer, block.start, block.used.shape[0])


def _write(buffer: Array, rows: Array, block: _Block) -> Array:
  """Writes the block's own rows in place; padding may overlap another block's rows."""
  used = block.used.reshape(block.used.shape + (1,) * (rows.ndim - 1))
  rows = jnp.where(used, rows, _read(buffer, block))
  return jax.lax.dynamic_update_slice_in_dim(buffer, rows, block.start, 0)


def _add_at(stack: Array, grad: Array, block: _Block) -> Array:
  """Adds to one expert's gradient in place; its first block overwrites the zeros."""
  # Not reading the zeros back saves a tenth of the memory traffic at 64 experts.
  old = jax.lax.cond(
    block.first,
    lambda stack: jnp.zeros_like(stack[0]),
    lambda stack: _pick(stack, block.expert),
    stack,
  )
  return jax.lax.dynamic_update_index_in_dim(stack, old + grad, block.expert, 0)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
  return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())))


def _stacks_in(weights: ExpertWeights) -> list[Array]:
  return [w for w in (weights.w_in, weights.w_gate) if w is not None]


def _biases_in(weights: ExpertWeights) -> list[Array]:
  return [b for b in (weights.b_in, weights.b_gate) if b is not None]


def _plus(rows: Array, bias: Array | None, block: _Block) -> Array:
  return rows if bias is None else rows + _pick(bias, block.expert)[None]


@jax.custom_vjp
def expert_loop(
  x: Float[Array, "T D"],
  gate: Float[Array, "N"],
  weights: ExpertWeights,
  arrays: Sorted,
) -> Float[Array, "T D"]:
  """Returns the sum over a token's kept assignments of gate * expert(token)."""
  return _forward(x, gate, weights, arrays, keep_hidden=False)[0]


def _forward(
  x: Array, gate: Array, weights: ExpertWeights, arrays: Sorted, keep_hidden: bool = True
) -> tuple[Array, Any]:
  blocks, moves = arrays.blocks, arrays.moves
  token = permute.token_of_row(moves)
  stacks, biases = _stacks_in(weights), _biases_in(weights) or [None, None]
  buffer = functools.partial(_rows_buffer, arrays, dtype=x.dtype, like=x)
  hidden = [buffer(w.shape[2]) for w in stacks if keep_hidden]

  def body(block: _Block, carry: tuple[list[Array], Array]) -> Any:
    hidden, out = carry
    with parts.scope(parts.DISPATCH):
      rows = permute.take(x, permute.take(token, block.row))
    pre = [_dot(rows, _pick(w, block.expert), (1, 0)) for w in stacks]
    pre = [_plus(p, b, block) for p, b in zip(pre, biases)]
    act = activate(pre[0], pre[-1], arrays.activation)
    y = _plus(_dot(act, _pick(weights.w_out, block.expert), (1, 0)), weights.b_out, block)
    # If hidden is not kept, the list is empty and zip stops at once.
    hidden = [_write(h, p, block) for h, p in zip(hidden, pre)]
    return hidden, _write(out, y, block)

  hidden, out = _over_blocks(blocks, body, (hidden, buffer(x.shape[1])))
  with parts.scope(parts.COMBINE):
    y = permute.sum_rows(out, gate, moves)
  return y, (x, gate, weights, arrays, hidden)


def _backward(residuals: Any, dy: Array) -> tuple[Array, Array, ExpertWeights, Any]:
  x, gate, weights, arrays, hidden = residuals
  blocks, moves = arrays.blocks, arrays.moves
  token = permute.token_of_row(moves)
  gate_of_row = permute.take_masked(gate, moves.assignment, moves.used).astype(x.dtype)
  stacks = _stacks_in(weights)

  def act_of(*pre: Array) -> Array:
    return activate(pre[0], pre[-1], arrays.activation)

  def body(block: _Block, carry: Any) -> Any:
    d_rows, d_gate, d_weights = carry
    tokens = permute.take(token, block.row)
    with parts.scope(parts.DISPATCH):
      rows = permute.take(x, tokens)
    with parts.scope(parts.COMBINE):
      g = permute.take(dy, tokens)
    scale = jnp.where(block.used, permute.take(gate_of_row, block.row), 0)
    act, pull = jax.vjp(act_of, *(_read(h, block) for h in hidden))
    d_act = _dot(g, _pick(weights.w_out, block.expert), (1, 1))
    # In float32 for any compute dtype: gates are float32.
    dg = jnp.sum(act.astype(jnp.float32) * d_act.astype(jnp.float32), axis=1)
    if weights.b_out is not None:
      own = _pick(weights.b_out, block.expert).astype(jnp.float32)
      dg = dg + jnp.sum(g.astype(jnp.float32) * own[None], axis=1)
    d_pre = pull(d_act * scale[:, None])
    grads = [_dot(act, g * scale[:, None], (0, 0))]
    grads += [_dot(rows, d, (0, 0)) for d in d_pre]
    if weights.b_out is not None:
      grads += [jnp.sum(d, axis=0) for d in (g * scale[:, None], *d_pre)]
    back = [_dot(d, _pick(w, block.expert), (1, 1)) for d, w in zip(d_pre, stacks)]
    d_row = functools.reduce(jnp.add, back)
    d_weights = [_add_at(w, g, block) for w, g in zip(d_weights, grads)]
    return _write(d_rows, d_row, block), _write(d_gate, dg, block), d_weights

  d_rows = _rows_buffer(arrays, x.shape[1], dtype=x.dtype, like=dy)
  d_gate = _rows_buffer(arrays, dtype=jnp.float32, like=dy)
  matrices = [weights.w_out, *stacks]
  if weights.b_out is not None:
    matrices += [weights.b_out, *_biases_in(weights)]
  d_weights = [_zeros(w.shape, w.dtype, dy) for w in matrices]
  d_rows, d_gate, d_weights = _over_blocks(blocks, body, (d_rows, d_gate, d_weights))
  with parts.scope(parts.DISPATCH):
    dx = permute.sum_rows(d_rows, None, moves)
  return (
    dx,
    permute.take_masked(d_gate, moves.place, moves.kept),
    _as_weights(d_weights, weights),
    None,
  )


def _as_weights(parts: list[Array], like: ExpertWeights) -> ExpertWeights:
  """Returns gradients in the order w_out, w_in, w_gate, b_out, b_in, b_gate."""
  gated = like.w_gate is not None
  names = ["w_out", "w_in", *(["w_gate"] if gated else [])]
  if like.b_out is not None:
    names += ["b_out", "b_in", *(["b_gate"] if gated else [])]
  return ExpertWeights(**dict(zip(names, parts, strict=True)))


expert_loop.defvjp(_forward, _backward)
