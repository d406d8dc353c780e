"""Dispatch by indices: each slot copies its token, each token collects its slots.

The same [E, C] slots as with dense masks, without the T*E*C products. The experts
process all slots in one batched matmul, so empty slots cost as much as full ones:
the cost depends on the capacity, not on the load.

Letters: G groups, T tokens of a group, D width, E experts, C slots per expert.
Source: V-MoE, arXiv:2106.05974, and its index-based dispatcher.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.experts import permute
from moejax.experts.weights import ExpertWeights, apply_experts
from moejax.routing.base import Routing


def slot_moves(routing: Routing) -> permute.Moves:
  """Returns the moves of one group, whose rows are its E*C slots in expert order."""
  num_slots = routing.num_slots
  slot = jnp.arange(num_slots, dtype=jnp.int32)
  start = jnp.cumsum(routing.load) - routing.load
  position = (start[:, None] + slot[None, :]).reshape(-1)
  last = routing.order.shape[0] - 1
  return permute.Moves(
    token=routing.token,
    place=routing.expert * num_slots + routing.slot,
    kept=routing.kept,
    assignment=permute.take(routing.order, jnp.minimum(position, last)),
    used=(slot[None, :] < routing.load[:, None]).reshape(-1),
    num_tokens=routing.num_tokens,
    num_selected=routing.num_selected,
  )


def gather(
  x: Float[Array, "G T D"],
  routing: Routing,
  weights: ExpertWeights,
  *,
  activation: str,
) -> Float[Array, "G T D"]:
  """Gathers tokens into slots by index and runs batched experts. Dropless uses C = T."""
  num_experts, num_slots = routing.num_experts, routing.num_slots
  num_groups, _, width = x.shape
  moves = jax.vmap(slot_moves)(routing)
  rows = jax.vmap(permute.to_rows)(x, moves)
  rows = rows.reshape(num_groups, num_experts, num_slots, width)
  out = apply_experts(jnp.swapaxes(rows, 0, 1), weights, activation)
  out = jnp.swapaxes(out, 0, 1).reshape(num_groups, num_experts * num_slots, width)
  return jax.vmap(permute.combine)(out, routing.gate, moves)
