"""Capacity: how many slots an expert has, and which assignments get them.

An expert computes at most C assignments of a group; the rest overflow. Priority
orders the queue; the overflow policy handles the assignments left without a slot.

Letters: T tokens of one group, E experts, K choices per token, C slots per
expert, N = T*K assignments, numbered token-major (n = t*K + k).
Sources: GShard, arXiv:2006.16668, section 2.2 and algorithm 1 (arrival order).
Codebases differ on whether K enters C; see docs/conventions.md.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.errors import ConfigError
from moejax.routing.base import RouterStats, Routing, SlotPolicy
from moejax.routing.overflow import place
from moejax.routing.placement import Assignments
from moejax.routing.queueing import Queue, invert, line_up, make_queue, normalize
from moejax.routing.scores import entropy, pick


def capacity_of(
  num_tokens: int,
  num_experts: int,
  num_selected: int,
  factor: float | None,
  *,
  convention: str = "per_assignment",
  min_capacity: int = 1,
) -> int | None:
  """Returns C, the slots per expert in one group: ceil(factor * K * T / E).

  At least `min_capacity`, and at most T (a token visits an expert at most once);
  T takes precedence.

  Args:
    num_tokens: T, including padding, so that C is static.
    factor: capacity factor; None means dropless.
    convention: per_assignment as above; per_token omits K, as Flaxformer, AXLearn
      and Praxis do; under slots the factor itself is C, as in Transformers' Switch.

  Returns:
    C, or None if dropless.

  Raises:
    ConfigError: factor not positive and finite, or an unknown convention.
  """
  if factor is None:
    return None
  if not 0 < factor < math.inf:
    raise ConfigError(
      f"--config.moe.capacity_factor={factor} leaves no expert a slot: give a positive "
      "number, or none for dropless."
    )
  # Exact for the factor as written: in floats 1.1 * 10 exceeds 11 and would give 12.
  slots = Fraction(repr(float(factor)))
  match convention:
    case "per_assignment":
      slots *= Fraction(num_selected * num_tokens, num_experts)
    case "per_token":
      slots *= Fraction(num_tokens, num_experts)
    case "slots":
      pass
    case _:
      raise ConfigError(
        f"--config.moe.capacity_convention={convention} is unknown: use per_assignment, "
        "per_token or slots."
      )
  return min(num_tokens, max(min_capacity, math.ceil(slots)))


class Slots(NamedTuple):
  """The slots given out; the fields are those of `Assignments`."""

  slot: Int[Array, "N"]
  kept: Bool[Array, "N"]
  order: Int[Array, "N"]
  load: Int[Array, "E"]
  chosen: Int[Array, "E"]


def _give_slots(
  expert: Int[Array, "N"],
  asked: Bool[Array, "N"],
  queue: Queue,
  policy: SlotPolicy,
  num_tokens: int,
) -> Slots:
  """Serves each expert's queue until its slots are full."""
  num_experts, capacity = policy.num_experts, policy.capacity
  asking = jnp.where(asked, expert, num_experts)
  line = line_up(asking, queue, num_experts, ranking=policy.ranking)
  chosen = line.start[1:] - line.start[:-1]
  rank = line.place - line.start.at[asking].get(mode="promise_in_bounds")
  if capacity is None:
    slot = jnp.where(asked, rank, num_tokens)
    return Slots(slot, asked, line.assignment, chosen, chosen)
  kept = asked & (rank < capacity)
  load = jnp.minimum(chosen, capacity)
  # Start of each expert's kept run, then the total twice: assignments that request no
  # slot come after the overflow of the last expert.
  ends = jnp.cumsum(load)
  start = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends, ends[-1:]])
  kept_before = start.at[asking + 1].get(mode="promise_in_bounds")
  kept_start = start.at[asking].get(mode="promise_in_bounds")
  place = jnp.where(kept, kept_start + rank, ends[-1] + line.place - kept_before)
  slot = jnp.where(kept, rank, capacity)
  return Slots(slot, kept, invert(place), load, chosen)


def assign(
  expert: Int[Array, "T K"],
  gate: Float[Array, "T K"],
  valid: Bool[Array, "T"],
  probs: Float[Array, "T E"],
  policy: SlotPolicy,
  key: Key[Array, ""] | None = None,
  *,
  wanted: Bool[Array, "T K"] | None = None,
  scores: Float[Array, "T E"] | None = None,
  values: Float[Array, "T E"] | None = None,
) -> Routing:
  """Assigns slots and builds the `Routing` of a token-choice router.

  All first choices are placed before any second choice, so a token never loses
  its best expert to another token's second best (GShard, algorithm 1), unless
  `policy.slot_order` says otherwise.

  Args:
    expert: chosen experts of each token, best first, all distinct.
    gate: their weights before renormalisation; differentiable.
    valid: False for padding, which takes no slot.
    probs: the router's probabilities, for losses and stats.
    key: for priority=random in training; None means arrival order.
    wanted: False for a choice given up before slots are assigned (GShard's random
      second expert); it takes no slot and is not counted.
    scores: ranking of experts for overflow=next_best, -inf if excluded; default probs.
    values: gates of experts taken by next_best; default probs.
  """
  num_tokens, num_selected = expert.shape
  first, norm = expert[:, 0], policy.renormalize_norm
  asked = jnp.broadcast_to(valid[:, None], expert.shape)
  gate = jnp.where(asked, gate.astype(jnp.float32), 0.0)
  before_drop = policy.renormalize == "before_drop"
  # by_gate compares final weights; batch priority compares raw gates.
  by_gate = policy.slot_order == "by_gate" and before_drop
  queue = make_queue(normalize(gate, norm) if by_gate else gate, policy, key)
  if wanted is not None:
    asked = asked & wanted
  slots = _give_slots(expert.reshape(-1), asked.reshape(-1), queue, policy, num_tokens)
  chosen = slots.chosen
  if policy.overflow == "next_best" and policy.capacity is not None:
    scores = probs if scores is None else scores
    expert, slots, moved = _place_overflow(expert, asked, slots, queue, scores, policy)
    taken = pick(probs if values is None else values, expert)
    gate = jnp.where(moved, taken, gate)
  if policy.slot_numbering == "arrival":
    slots = _renumber(expert, slots, policy)
  kept = slots.kept.reshape(expert.shape)
  if before_drop:
    gate = normalize(gate, norm)
  gate = jnp.where(kept, gate, 0.0)
  if policy.renormalize == "after_drop":
    gate = normalize(gate, norm)
  if policy.gate_scale != 1.0:
    gate = gate * policy.gate_scale
  token = jnp.arange(num_tokens * num_selected, dtype=jnp.int32) // num_selected
  placement = Assignments(
    token=token,
    expert=expert.reshape(-1),
    slot=slots.slot,
    gate=gate.reshape(-1),
    kept=slots.kept,
    order=slots.order,
    load=slots.load,
    num_tokens=num_tokens,
    capacity=policy.capacity,
    num_selected=num_selected,
  )
  stats = make_stats(probs, valid, chosen, slots.load, jnp.any(kept, axis=-1))
  return Routing(placement=placement, probs=probs, stats=stats, first=first)


def _place_overflow(
  expert: Int[Array, "T K"],
  asked: Bool[Array, "T K"],
  slots: Slots,
  queue: Queue,
  scores: Float[Array, "T E"],
  policy: SlotPolicy,
) -> tuple[Int[Array, "T K"], Slots, Bool[Array, "T K"]]:
  """Moves overflowed assignments to each token's next-best expert with room.

  Kept assignments keep their slots: moved ones queue behind all the others.

  Returns:
    expert: the expert of every assignment after the move.
    slots: the slots of all assignments.
    moved: which assignments changed expert.
  """
  assert policy.capacity is not None
  kept = slots.kept.reshape(expert.shape)
  room = policy.capacity - slots.load
  position = queue.position.reshape(expert.shape)
  expert, moved = place(expert, kept, asked & ~kept, scores, room, position)
  behind = jnp.where(moved, position + position.size, position)
  again = Queue(behind.reshape(-1), jnp.tile(queue.assignment, 2))
  staying = (kept | moved).reshape(-1)
  num_tokens = expert.shape[0]
  slots = _give_slots(expert.reshape(-1), staying, again, policy, num_tokens)
  return expert, slots, moved


def _renumber(expert: Int[Array, "T K"], slots: Slots, policy: SlotPolicy) -> Slots:
  """Renumbers the kept slots in token order."""
  index = jnp.arange(expert.size, dtype=jnp.int32)
  queue = Queue(index, index)
  return _give_slots(expert.reshape(-1), slots.kept, queue, policy, expert.shape[0])


def make_stats(
  probs: Float[Array, "T E"],
  valid: Bool[Array, "T"],
  chosen: Int[Array, "E"],
  load: Int[Array, "E"],
  served: Bool[Array, "T"],
) -> RouterStats:
  """Returns the router's sums over one group; no gradient flows through them.

  Args:
    chosen: assignments requested, per expert.
    load: assignments kept, per expert.
    served: whether any assignment of the token was kept.
  """
  probs = jax.lax.stop_gradient(probs)
  counted = valid.astype(jnp.float32)
  return RouterStats(
    num_valid=jnp.sum(counted),
    chosen=chosen.astype(jnp.float32),
    load=load.astype(jnp.float32),
    importance=jnp.einsum("t,te->e", counted, probs),
    entropy=jnp.sum(counted * entropy(probs)),
    dropped_tokens=jnp.sum((valid & ~served).astype(jnp.float32)),
  )
