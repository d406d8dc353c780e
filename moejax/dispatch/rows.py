"""Dispatch by sorting: `--config.moe.dispatcher=grouped`.

Each expert runs on exactly the rows assigned to it. The assignments of all groups are
sorted by expert, so capacity and dropless cost the same per kept assignment, and empty
slots cost nothing.

Letters: G groups, T tokens of a group, D width, E experts, N assignments of a group, A of
all groups.
Sources: MegaBlocks, arXiv:2211.15841 (dropless as grouped matmuls); the measurements in
docs/speed.md.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import parts
from moejax.dispatch.base import Layout
from moejax.experts import permute
from moejax.experts.blocks import make_blocks, sizes_for
from moejax.experts.expert_loop import Sorted, expert_loop
from moejax.experts.grouped_matmul import apply_ragged_experts
from moejax.experts.weights import ExpertWeights
from moejax.platform import target_platform
from moejax.routing.placement import Placement, whole_tokens
from moejax.types import pytree

LOOP = "loop"


@pytree
class Rows(Layout):
  """The assignments of all groups in expert order, one row each."""

  moves: permute.Moves
  gate: Float[Array, "A"]
  load: Int[Array, "E"]
  """Kept rows of each expert."""

  @classmethod
  def of(cls, placement: Placement) -> "Rows":
    """Returns the layout of G groups, without sorting again.

    Each group is already sorted, so an assignment's row is its expert's start, plus the
    expert's rows from earlier groups, plus its own slot.
    """
    groups = whole_tokens(placement, "grouped")
    num_groups, n = groups.expert.shape
    load = jnp.sum(groups.load, axis=0)
    start = jnp.cumsum(load) - load
    start = start[None, :] + jnp.cumsum(groups.load, axis=0) - groups.load
    place = jnp.take_along_axis(start, groups.expert, axis=1) + groups.slot
    place, kept = place.reshape(-1), groups.kept.reshape(-1)
    index = jnp.arange(num_groups * n, dtype=jnp.int32)
    if num_groups == 1:
      order = groups.order[0]
    else:
      target = jnp.where(kept, place, num_groups * n)
      order = jnp.zeros_like(place)
      order = order.at[target].set(index, mode="drop", unique_indices=True)
    group = jnp.arange(num_groups, dtype=jnp.int32)[:, None] * groups.num_tokens
    moves = permute.Moves(
      token=(groups.token + group).reshape(-1),
      place=place,
      kept=kept,
      assignment=order,
      used=index < jnp.sum(load),
      num_tokens=num_groups * groups.num_tokens,
      num_selected=groups.num_selected,
    )
    return cls(moves=moves, gate=groups.gate.reshape(-1), load=load)

  def to_experts(self, x: Float[Array, "*G T D"]) -> Float[Array, "A D"]:
    """Returns the rows, zero where no assignment is kept."""
    return permute.to_rows(x.reshape(-1, x.shape[-1]), self.moves)

  def gates(self) -> Float[Array, "A"]:
    """Returns the gate of each row, to travel with it."""
    return permute.gate_rows(self.gate, self.moves)

  @parts.of_part(parts.COMBINE)
  def from_experts(self, rows: Float[Array, "A D"]) -> Float[Array, "T D"]:
    """Returns each token's sum of rows, which are already weighted."""
    return permute.add_up(rows, self.moves)

  def run(
    self,
    x: Float[Array, "*G T D"],
    weights: ExpertWeights,
    *,
    activation: str,
    chunks: int = 1,
    implementation: str | None = None,
  ) -> Float[Array, "*G T D"]:
    """Runs the experts on their rows; see `Layout.run`.

    Args:
      x: tokens of all groups.
      weights: of the experts.
      activation: of the experts.
      chunks: parts that ragged matmuls compute one after the other, to save memory;
        ignored by the loop.
      implementation: loop, or one of `grouped_matmul.IMPLEMENTATIONS`; None uses the
        loop over blocks on CPU, and the best ragged matmul elsewhere.
    """
    moves, tokens = self.moves, x.reshape(-1, x.shape[-1])
    if implementation is None and target_platform() == "cpu":
      implementation = LOOP
    if implementation == LOOP:
      # Moves rows inside the loop, so that [A, D] is never written.
      num_rows, num_experts = moves.token.shape[0], self.load.shape[0]
      blocks = make_blocks(self.load, num_rows, sizes_for(num_rows, num_experts))
      arrays = Sorted(moves=moves, blocks=blocks, activation=activation)
      with parts.scope(parts.EXPERTS):
        return expert_loop(tokens, self.gate, weights, arrays).reshape(x.shape)
    out = apply_ragged_experts(
      self.to_experts(x),
      self.load,
      weights,
      activation,
      gate=self.gates(),
      chunks=chunks,
      implementation=implementation,
    )
    return self.from_experts(out).reshape(x.shape)
