"""Slot queues: the order of requests, and assignments sorted by expert.

Letters: T tokens of one group, E experts, K choices per token, N = T*K assignments,
numbered token-major (n = t*K + k), P places in the queue.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moejax.errors import ConfigError
from moejax.routing.base import SlotPolicy
from moejax.routing.scores import ratio

_PACKED_BITS = 31
"""Bits of an int32 without the sign."""

COUNTING_LIMIT = 256
"""Maximum number of experts for which counting pays off: it creates N*E integers."""


class Queue(NamedTuple):
  """The order in which the N assignments of a group request slots."""

  position: Int[Array, "N"]
  """The place in the queue of each assignment."""
  assignment: Int[Array, "P"]
  """The assignment at each place; P is N, or more if some places are empty."""


def make_queue(
  gate: Float[Array, "T K"], policy: SlotPolicy, key: Key[Array, ""] | None
) -> Queue:
  """Ranks tokens by `policy.priority`, then interleaves their choices."""
  num_tokens, num_selected = gate.shape
  if policy.slot_order == "by_gate":
    _, assignment = jax.lax.sort(
      (-jax.lax.stop_gradient(gate.T.reshape(-1)), _arrival(num_tokens, num_selected)),
      num_keys=1,
      is_stable=True,
    )
    return Queue(invert(assignment), assignment)
  rank = jnp.arange(num_tokens, dtype=jnp.int32)
  token = rank
  by_batch = policy.slot_order == "batch_priority"
  match "gate" if by_batch else policy.priority:
    case "arrival":
      pass
    case "gate":
      best = jax.lax.stop_gradient(jnp.max(gate, axis=-1))
      _, token = jax.lax.sort((-best, rank), num_keys=1, is_stable=True)
      rank = invert(token)
    case "random":
      if key is not None:  # Evaluation is deterministic: arrival order.
        token = jax.random.permutation(key, rank)
        rank = invert(token)
    case _:
      raise ConfigError(
        f"--config.moe.priority={policy.priority} is unknown: use arrival, gate or "
        "random."
      )
  choice = jnp.arange(num_selected, dtype=jnp.int32)
  if policy.slot_order == "token_major":
    position = rank[:, None] * num_selected + choice[None, :]
    assignment = token[:, None] * num_selected + choice[None, :]
  else:
    position = choice[None, :] * num_tokens + rank[:, None]
    assignment = token[None, :] * num_selected + choice[:, None]
  return Queue(position.reshape(-1), assignment.reshape(-1))


def _arrival(num_tokens: int, num_selected: int) -> Int[Array, "N"]:
  """Returns assignments in arrival order: all first choices, then all second ones."""
  index = jnp.arange(num_tokens * num_selected, dtype=jnp.int32)
  return index % num_tokens * num_selected + index // num_tokens


def invert(permutation: Int[Array, "N"]) -> Int[Array, "N"]:
  """Returns the inverse permutation: out[permutation[i]] = i."""
  index = jnp.arange(permutation.shape[0], dtype=jnp.int32)
  out = jnp.zeros_like(index)
  return out.at[permutation].set(index, unique_indices=True, mode="promise_in_bounds")


class Line(NamedTuple):
  """Assignments sorted by (expert, place in the queue); those without a request last."""

  place: Int[Array, "N"]
  """The place in the line of each assignment."""
  assignment: Int[Array, "N"]
  """The assignment at each place."""
  start: Int[Array, "E+1"]
  """Start of each expert's run; the last entry is the number of requests."""


def line_up(
  expert: Int[Array, "N"],
  queue: Queue,
  num_experts: int,
  *,
  ranking: Literal["sort", "count"] = "sort",
) -> Line:
  """Sorts assignments by (expert, place in the queue).

  Args:
    expert: of each assignment; E if no slot is requested.
    queue: the order of requests.
    num_experts: E.
    ranking: the algorithm. The TPU compiler takes 10 to 20 seconds for each sort in a
      program and runs it as a network of log^2 N passes; counting is one cumulative sum.
  """
  if ranking == "count" and num_experts <= COUNTING_LIMIT:
    return _line_up_by_counting(expert, queue, num_experts)
  bits = max(1, (queue.assignment.shape[0] - 1).bit_length())
  if (num_experts + 1) << bits <= 2**_PACKED_BITS:
    # One packed int32 sort: three to five times cheaper than argsort on CPU.
    packed = jnp.sort((expert << bits) | queue.position)
    experts, position = packed >> bits, packed & ((1 << bits) - 1)
  else:
    experts, position = jax.lax.sort((expert, queue.position), num_keys=2)
  bounds = jnp.arange(num_experts + 1, dtype=jnp.int32)
  start = jnp.searchsorted(experts, bounds).astype(jnp.int32)
  assignment = queue.assignment.at[position].get(mode="promise_in_bounds")
  return Line(invert(assignment), assignment, start)


def _line_up_by_counting(expert: Int[Array, "N"], queue: Queue, num_experts: int) -> Line:
  """Computes each place as its expert's start plus that expert's earlier requests."""
  n, places = expert.shape[0], queue.assignment.shape[0]
  asking = expert.at[queue.assignment].get(mode="promise_in_bounds")
  if places > n:  # Some places are empty: their assignment is at another place.
    index = jnp.arange(places, dtype=jnp.int32)
    here = queue.position.at[queue.assignment].get(mode="promise_in_bounds") == index
    asking = jnp.where(here, asking, num_experts + 1)
  experts = jnp.arange(num_experts + 1, dtype=jnp.int32)
  is_expert = (asking[:, None] == experts[None, :]).astype(jnp.int32)
  until = jnp.cumsum(is_expert, axis=0)
  start = jnp.cumsum(until[-1]) - until[-1]
  by_position = jnp.sum(is_expert * (until - 1 + start[None, :]), axis=1)
  place = by_position.at[queue.position].get(mode="promise_in_bounds")
  # Inverting a permutation is slow to compile on TPUs, and is removed if unused.
  return Line(place, invert(place), start)


def normalize(gate: Float[Array, "T K"], norm: float = 1.0) -> Float[Array, "T K"]:
  """Scales each row to p-norm 1, p = `norm`; rows of zeros stay zero."""
  if norm == 1.0:
    total = jnp.sum(gate, axis=-1, keepdims=True)
  else:
    # Divided by the largest gate, so that small gates to a high power do not underflow.
    # Neither the norm nor its gradient depends on the divisor.
    top = jax.lax.stop_gradient(jnp.max(gate, axis=-1, keepdims=True))
    top = jnp.where(top > 0, top, 1.0)
    powers = jnp.sum(jnp.power(gate / top, norm), axis=-1, keepdims=True)
    # Rows of zeros are replaced before the root, whose slope at zero is infinite.
    total = top * jnp.where(powers > 0, powers, 1.0) ** (1.0 / norm)
  return ratio(gate, total)
