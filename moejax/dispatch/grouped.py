"""Dispatch by sorting: each expert runs on exactly the rows assigned to it.

The assignments of all groups are sorted by expert, so capacity and dropless cost
the same per kept assignment, and empty slots cost nothing.

Letters: G groups, T tokens of a group, D width, E experts, N assignments.
Sources: MegaBlocks, arXiv:2211.15841 (dropless as grouped matmuls); the
measurements in docs/speed.md.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.experts import permute
from moejax.experts.blocks import make_plan, sizes_for
from moejax.experts.expert_loop import Sorted, expert_loop
from moejax.experts.grouped_matmul import apply_ragged_experts
from moejax.experts.weights import ExpertWeights
from moejax.platform import target_platform
from moejax.routing.base import Routing

LOOP = "loop"


def line_up(
  token: Int[Array, "G N"],
  expert: Int[Array, "G N"],
  slot: Int[Array, "G N"],
  kept: Bool[Array, "G N"],
  load: Int[Array, "G E"],
  *,
  num_tokens: int,
  num_selected: int | None,
  order: Int[Array, "N"] | None = None,
) -> tuple[permute.Moves, Int[Array, "E"]]:
  """Sorts the assignments of all groups by expert.

  Each group is already sorted, so an assignment's row is its expert's start, plus the
  expert's rows from earlier groups, plus its own slot; nothing is sorted again. Kept
  slots are 0, 1, ... load - 1 by the contract of `Routing`.

  Args:
    token: token index within its group.
    expert: any valid index where not kept.
    slot: position in the expert's queue in this group.
    kept: which assignments get a row.
    load: kept assignments per group and expert.
    num_tokens: T of one group.
    num_selected: K if assignments are token-major.
    order: the assignment of each row, if there is only one group and it is known.

  Returns:
    The moves, whose rows are assignments in expert order, and each expert's load.
  """
  num_groups, n = expert.shape
  total = jnp.sum(load, axis=0)
  start = jnp.cumsum(total) - total
  start = start[None, :] + jnp.cumsum(load, axis=0) - load
  place = (jnp.take_along_axis(start, expert, axis=1) + slot).reshape(-1)
  index = jnp.arange(num_groups * n, dtype=jnp.int32)
  if order is None:
    target = jnp.where(kept.reshape(-1), place, num_groups * n)
    order = jnp.zeros_like(place)
    order = order.at[target].set(index, mode="drop", unique_indices=True)
  group = jnp.arange(num_groups, dtype=jnp.int32)[:, None] * num_tokens
  moves = permute.Moves(
    token=(token + group).reshape(-1),
    place=place,
    kept=kept.reshape(-1),
    assignment=order,
    used=index < jnp.sum(total),
    num_tokens=num_groups * num_tokens,
    num_selected=num_selected,
  )
  return moves, total


def sorted_moves(routing: Routing) -> tuple[permute.Moves, Int[Array, "E"]]:
  """Applies `line_up` to a batch of routings."""
  num_groups, num_tokens = routing.probs.shape[:2]
  return line_up(
    routing.token,
    routing.expert,
    routing.slot,
    routing.kept,
    routing.load,
    num_tokens=num_tokens,
    num_selected=routing.num_selected,
    order=routing.order[0] if num_groups == 1 else None,
  )


def run_rows(
  x: Float[Array, "T D"],
  gate: Float[Array, "A"],
  moves: permute.Moves,
  load: Int[Array, "E"],
  weights: ExpertWeights,
  *,
  activation: str,
  chunks: int = 1,
  implementation: str | None = None,
) -> Float[Array, "T D"]:
  """Runs the experts on rows in expert order.

  Args:
    x: tokens of all groups.
    gate: gate of each assignment.
    moves: which row serves which assignment.
    load: rows of each expert.
    weights: of the experts.
    activation: of the experts.
    chunks: parts that ragged matmuls compute one after the other, to save memory;
      ignored by the loop.
    implementation: loop, or one of `grouped_matmul.IMPLEMENTATIONS`; None uses the
      loop over blocks on CPU, and the best ragged matmul elsewhere.
  """
  if implementation is None and target_platform() == "cpu":
    implementation = LOOP
  if implementation == LOOP:
    num_assignments, num_experts = moves.token.shape[0], load.shape[0]
    plan = make_plan(load, num_assignments, sizes_for(num_assignments, num_experts))
    return expert_loop(
      x, gate, weights, Sorted(moves=moves, plan=plan, activation=activation)
    )
  out = apply_ragged_experts(
    permute.to_rows(x, moves),
    load,
    weights,
    activation,
    gate=permute.gate_rows(gate, moves),
    chunks=chunks,
    implementation=implementation,
  )
  return permute.add_up(out, moves)


def grouped(
  x: Float[Array, "G T D"],
  routing: Routing,
  weights: ExpertWeights,
  *,
  activation: str,
  chunks: int = 1,
  implementation: str | None = None,
) -> Float[Array, "G T D"]:
  """Runs a loop over blocks on CPU, ragged matmuls elsewhere; see `run_rows`."""
  moves, load = sorted_moves(routing)
  flat, gate = x.reshape(-1, x.shape[-1]), routing.gate.reshape(-1)
  out = run_rows(
    flat,
    gate,
    moves,
    load,
    weights,
    activation=activation,
    chunks=chunks,
    implementation=implementation,
  )
  return out.reshape(x.shape)
