"""Dispatch by sorting: each expert runs on exactly the rows it was given.

The assignments of all groups are lined up expert by expert, so capacity and
dropless cost the same per kept assignment, and empty slots cost nothing.

Letters: G groups, T tokens of a group, D width, E experts, N assignments.
Sources: MegaBlocks, arXiv:2211.15841 (dropless as grouped products); the
measurements in docs/speed.md.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.dispatch.base import ExpertWeights
from moejax.kernels import permute
from moejax.kernels.expert_loop import Sorted, expert_loop
from moejax.kernels.grouped_matmul import apply_ragged_experts
from moejax.kernels.plan import make_plan, sizes_for
from moejax.routing.base import Routing


def merge_groups(
  routing: Routing,
) -> tuple[Int[Array, "A"], Int[Array, "A"], Int[Array, "E"]]:
  """Lines up the A = G*N assignments of all groups, expert by expert.

  Each group is sorted already, so an assignment's position is its expert's start
  plus what earlier groups gave that expert plus its own slot; nothing is sorted
  again. Kept slots are 0, 1, ... load - 1 by the contract of `Routing`.

  Returns:
    position of each assignment (anything where not kept); the assignment at each
    position (kept ones first, anything after); the load of each expert.
  """
  num_groups, n = routing.order.shape
  load = jnp.sum(routing.load, axis=0)
  start = jnp.cumsum(load) - load
  start = start[None, :] + jnp.cumsum(routing.load, axis=0) - routing.load
  position = jnp.take_along_axis(start, routing.expert, axis=1) + routing.slot
  position = position.reshape(-1)
  if num_groups == 1:
    return position, routing.order[0], load
  target = jnp.where(routing.kept.reshape(-1), position, num_groups * n)
  index = jnp.arange(num_groups * n, dtype=jnp.int32)
  order = jnp.zeros_like(index).at[target].set(index, mode="drop", unique_indices=True)
  return position, order, load


def sorted_moves(
  routing: Routing,
) -> tuple[permute.Moves, Int[Array, "E"]]:
  """The moves of all groups at once, whose rows are assignments in experts' order."""
  place, order, load = merge_groups(routing)
  num_groups, num_tokens = routing.probs.shape[:2]
  group = jnp.arange(num_groups, dtype=jnp.int32)[:, None] * num_tokens
  index = jnp.arange(order.shape[0], dtype=jnp.int32)
  moves = permute.Moves(
    token=(routing.token + group).reshape(-1),
    place=place,
    kept=routing.kept.reshape(-1),
    assignment=order,
    used=index < jnp.sum(load),
    num_tokens=num_groups * num_tokens,
    num_selected=routing.num_selected,
  )
  return moves, load


def grouped(
  x: Float[Array, "G T D"],
  routing: Routing,
  weights: ExpertWeights,
  *,
  activation: str,
) -> Float[Array, "G T D"]:
  """The loop over blocks on a CPU, ragged products elsewhere."""
  if jax.default_backend() == "cpu":
    return grouped_by_loop(x, routing, weights, activation=activation)
  return grouped_by_matmul(x, routing, weights, activation=activation)


def grouped_by_loop(
  x: Float[Array, "G T D"],
  routing: Routing,
  weights: ExpertWeights,
  *,
  activation: str,
) -> Float[Array, "G T D"]:
  """Rows in experts' order, one product per block of them; tokens by index."""
  moves, load = sorted_moves(routing)
  num_assignments, num_experts = moves.token.shape[0], load.shape[0]
  plan = make_plan(load, num_assignments, sizes_for(num_assignments, num_experts))
  arrays = Sorted(moves=moves, plan=plan, activation=activation)
  flat = x.reshape(-1, x.shape[-1])
  return expert_loop(flat, routing.gate.reshape(-1), weights, arrays).reshape(x.shape)


def grouped_by_matmul(
  x: Float[Array, "G T D"],
  routing: Routing,
  weights: ExpertWeights,
  *,
  activation: str,
  implementation: str | None = None,
) -> Float[Array, "G T D"]:
  """Rows in experts' order, ragged products over all of them; tokens by index."""
  moves, load = sorted_moves(routing)
  rows = permute.to_rows(x.reshape(-1, x.shape[-1]), moves)
  out = apply_ragged_experts(
    rows, load, weights, activation, implementation=implementation
  )
  return permute.combine(out, routing.gate.reshape(-1), moves).reshape(x.shape)
