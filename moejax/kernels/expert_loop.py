"""The experts on a CPU: one loop per block size, only over rows that exist.

XLA:CPU has no ragged product (its `ragged_dot` multiplies every row with every
expert), and a batched one wastes the empty slots. A loop of plain products,
whose weights are picked by a dynamic index, runs near the speed of one large
product from 64 rows on; docs/speed.md holds the measurements.

Tokens are gathered inside the loop, so no permuted copy of x exists. The backward
pass is written by hand: it keeps only the hidden pre-activations, needs no expert
output for the gate (d gate = <act(h), g W_out^T>), and moves rows by gathers.

Letters: T tokens (all groups), D width, E experts, F expert hidden width, N
assignments, R rows of the padded buffer.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.dispatch.base import ExpertWeights, activate
from moejax.kernels import permute
from moejax.kernels.plan import Plan
from moejax.types import pytree, static_field


@pytree
class Sorted:
  """The assignments of all groups in experts' order, and the way back."""

  token: Int[Array, "N"]
  """Token of each position."""
  assignment: Int[Array, "N"]
  """Assignment of each position."""
  moves: permute.Moves
  """Between assignments and the padded rows of `plan`."""
  plan: Plan
  activation: str = static_field()


def _loop(plan: Plan, body: Any, carry: Any) -> Any:
  """Runs body(block index, size, carry) over all blocks, one loop per size."""
  for z, size in enumerate(plan.sizes):
    carry = jax.lax.fori_loop(
      plan.bound[z], plan.bound[z + 1], functools.partial(body, size), carry
    )
  return carry


class _Block(NamedTuple):
  expert: Int[Array, ""]
  row: Int[Array, ""]
  token: Int[Array, "B"]
  position: Int[Array, "B"]
  used: Array


def _block(arrays: Sorted, size: int, m: Array) -> _Block:
  plan = arrays.plan
  offset = jnp.arange(size, dtype=jnp.int32)
  count = plan.count[m]
  # Padding repeats the block's last row: whatever it holds stays within its expert.
  position = plan.position[m] + jnp.minimum(offset, count - 1)
  token = permute.take(arrays.token, position)
  return _Block(plan.expert[m], plan.row[m], token, position, offset < count)


def _pick(stack: Array, index: Array) -> Array:
  return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)


def _write(buffer: Array, rows: Array, start: Array) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(buffer, rows, start, 0)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
  return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())))


@jax.custom_vjp
def expert_loop(
  x: Float[Array, "T D"],
  gate: Float[Array, "N"],
  weights: ExpertWeights,
  arrays: Sorted,
) -> Float[Array, "T D"]:
  """Sum over a token's kept assignments of gate * expert(token)."""
  return _forward(x, gate, weights, arrays)[0]


def _forward(x, gate, weights, arrays):
  plan = arrays.plan
  stacks = [w for w in (weights.w_in, weights.w_gate) if w is not None]
  hidden = [jnp.zeros((plan.num_rows, w.shape[2]), x.dtype) for w in stacks]
  out = jnp.zeros((plan.num_rows, x.shape[1]), x.dtype)

  def body(size, m, carry):
    *hidden, out = carry
    block = _block(arrays, size, m)
    rows = permute.take(x, block.token)
    pre = [_dot(rows, _pick(w, block.expert), (1, 0)) for w in stacks]
    act = activate(pre[0], pre[-1], arrays.activation)
    y = _dot(act, _pick(weights.w_out, block.expert), (1, 0))
    hidden = [_write(h, p, block.row) for h, p in zip(hidden, pre)]
    return (*hidden, _write(out, y, block.row))

  *hidden, out = _loop(plan, body, (*hidden, out))
  y = permute.combine(out, gate, arrays.moves)
  return y, (x, gate, weights, arrays, tuple(hidden))


def _backward(residuals, dy):
  x, gate, weights, arrays, hidden = residuals
  plan = arrays.plan
  gate_sorted = permute.take(gate, arrays.assignment).astype(x.dtype)

  def act_of(*pre):
    return activate(pre[0], pre[-1], arrays.activation)

  def body(size, m, carry):
    d_rows, d_gate, dw = carry
    block = _block(arrays, size, m)
    rows, g = permute.take(x, block.token), permute.take(dy, block.token)
    scale = jnp.where(block.used, permute.take(gate_sorted, block.position), 0)
    pre = [jax.lax.dynamic_slice_in_dim(h, block.row, size) for h in hidden]
    act, pull = jax.vjp(act_of, *pre)
    d_act = _dot(g, _pick(weights.w_out, block.expert), (1, 1))
    dg = jnp.sum(act.astype(jnp.float32) * d_act.astype(jnp.float32), axis=1)
    d_pre = pull(d_act * scale[:, None])
    d_out = _dot(act, g * scale[:, None], (0, 0))
    d_in = [_dot(rows, d, (0, 0)) for d in d_pre]
    stacks = [w for w in (weights.w_in, weights.w_gate) if w is not None]
    d_row = sum(_dot(d, _pick(w, block.expert), (1, 1)) for d, w in zip(d_pre, stacks))
    new = [_pick(w, block.expert) + d for w, d in zip(dw, [d_out, *d_in])]
    dw = tuple(_write(w, d[None], block.expert) for w, d in zip(dw, new))
    return _write(d_rows, d_row, block.row), _write(d_gate, dg, block.row), dw

  stacks = [weights.w_out, weights.w_in]
  if weights.w_gate is not None:
    stacks.append(weights.w_gate)
  init = (
    jnp.zeros((plan.num_rows, x.shape[1]), x.dtype),
    jnp.zeros((plan.num_rows,), jnp.float32),
    tuple(jnp.zeros(w.shape, w.dtype) for w in stacks),
  )
  d_rows, d_gate, dw = _loop(plan, body, init)
  moves = arrays.moves
  dx = permute.sum_over_choices(permute.from_rows(d_rows, moves), moves)
  d_weights = ExpertWeights(
    w_out=dw[0], w_in=dw[1], w_gate=dw[2] if len(dw) > 2 else None
  )
  return dx, permute.from_rows(d_gate[:, None], moves)[:, 0], d_weights, None


expert_loop.defvjp(_forward, _backward)
