"""Dispatch by indices: `--config.moe.dispatcher=gather`.

Each slot copies its token, each token collects its slots: the same [E, C] slots as with
dense weights, without the T*E*C products. The experts process all slots in one batched
matmul, so empty slots cost as much as full ones: the cost depends on the capacity, not
on the load.

Letters: G groups, T tokens of a group, D width, E experts, C slots per expert, N
assignments of a group.
Source: V-MoE, arXiv:2106.05974, and its index-based dispatcher.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import parts
from moejax.dispatch.base import SlotLayout
from moejax.experts import permute
from moejax.routing.placement import Assignments, Placement, whole_tokens
from moejax.types import pytree, static_field


@pytree
class Slots(SlotLayout):
  """E*C slots of each group, filled by index. Dropless has C = T."""

  moves: permute.Moves
  """The moves of each group; rows are the slots, in expert order."""
  gate: Float[Array, "G N"]
  num_experts: int = static_field()
  num_slots: int = static_field()
  """C."""

  @classmethod
  def of(cls, placement: Placement) -> "Slots":
    groups = whole_tokens(placement, "gather")
    return cls(
      moves=jax.vmap(_moves)(groups),
      gate=groups.gate,
      num_experts=groups.num_experts,
      num_slots=groups.num_slots,
    )

  def to_experts(self, x: Float[Array, "G T D"]) -> Float[Array, "E G C D"]:
    rows = jax.vmap(permute.to_rows)(x, self.moves)
    rows = rows.reshape(x.shape[0], self.num_experts, self.num_slots, x.shape[-1])
    return jnp.swapaxes(rows, 0, 1)

  @parts.of_part(parts.COMBINE)
  def from_experts(self, rows: Float[Array, "E G C D"]) -> Float[Array, "G T D"]:
    return jax.vmap(permute.combine)(_by_group(rows), self.gate, self.moves)

  def gates(self) -> Float[Array, "E G C"]:
    """Returns the gate of each slot, zero where it is empty."""
    gates = jax.vmap(permute.gate_rows)(self.gate, self.moves)
    gates = gates.reshape(-1, self.num_experts, self.num_slots)
    return jnp.swapaxes(gates, 0, 1)

  @parts.of_part(parts.COMBINE)
  def add_up(self, rows: Float[Array, "E G C D"]) -> Float[Array, "G T D"]:
    return jax.vmap(permute.add_up)(_by_group(rows), self.moves)


def _by_group(rows: Float[Array, "E G C D"]) -> Float[Array, "G EC D"]:
  """Returns the slots of each group in expert order."""
  num_experts, num_groups, num_slots, width = rows.shape
  rows = jnp.swapaxes(rows, 0, 1)
  return rows.reshape(num_groups, num_experts * num_slots, width)


def _moves(group: Assignments) -> permute.Moves:
  """Returns the moves of one group, whose rows are its E*C slots in expert order."""
  slot = jnp.arange(group.num_slots, dtype=jnp.int32)
  start = jnp.cumsum(group.load) - group.load
  position = (start[:, None] + slot[None, :]).reshape(-1)
  last = group.order.shape[0] - 1
  return permute.Moves(
    token=group.token,
    place=group.expert * group.num_slots + group.slot,
    kept=group.kept,
    assignment=permute.take(group.order, jnp.minimum(position, last)),
    used=(slot[None, :] < group.load[:, None]).reshape(-1),
    num_tokens=group.num_tokens,
    num_selected=group.num_selected,
  )
