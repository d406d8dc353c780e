"""Overflow: where an assignment goes whose expert has no slot left.

next_best: to that token's best expert with room that does not serve it already,
in the queue's order, until placed or none has room. That is a serial dictatorship;
since all experts rank tokens by the same queue, it is also the one stable matching,
and it is found in a few parallel rounds instead of one step per assignment: everyone
left over asks for the best expert that has not turned it away, and an expert that
more ask than it has room for turns away everyone from the first one too many on.
In each round at least the expert that fills up first is settled, so there are at
most E rounds.

Letters: T tokens of one group, E experts, K choices per token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def place(
  expert: Int[Array, "T K"],
  kept: Bool[Array, "T K"],
  overflowed: Bool[Array, "T K"],
  scores: Float[Array, "T E"],
  room: Int[Array, "E"],
  position: Int[Array, "T K"],
) -> tuple[Int[Array, "T K"], Bool[Array, "T K"]]:
  """Places overflowed assignments, first choices before second ones.

  Args:
    kept: assignments that have their slot.
    overflowed: those that want one.
    scores: what next-best means; -inf marks an expert that may not be taken.
    room: slots left per expert.
    position: place in the queue; choice-major, so that all of one choice stand
      before all of the next.

  Returns:
    expert: with the new expert where placed.
    placed: which overflowed assignments found one.
  """
  scores = jax.lax.stop_gradient(scores)
  index = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, :]
  allowed = scores > -jnp.inf
  for k in range(expert.shape[-1]):
    allowed &= ~((index == expert[:, k : k + 1]) & kept[:, k : k + 1])
  columns, placed = [], []
  for k in range(expert.shape[-1]):
    found, ok = _match(scores, allowed, overflowed[:, k], position[:, k], room)
    taken = (index == found[:, None]) & ok[:, None]
    allowed &= ~taken
    room = room - jnp.sum(taken.astype(jnp.int32), axis=0)
    columns.append(jnp.where(ok, found, expert[:, k]))
    placed.append(ok)
  return jnp.stack(columns, axis=-1), jnp.stack(placed, axis=-1)


def _match(
  scores: Float[Array, "T E"],
  allowed: Bool[Array, "T E"],
  pending: Bool[Array, "T"],
  position: Int[Array, "T"],
  room: Int[Array, "E"],
) -> tuple[Int[Array, "T"], Bool[Array, "T"]]:
  """Serial dictatorship of the pending tokens over the experts' room.

  An expert's cutoff is the place in the queue from which on it turns tokens away.
  """
  never = jnp.iinfo(jnp.int32).max
  num_tokens, num_experts = scores.shape
  token = jnp.arange(num_tokens, dtype=jnp.int32)

  def ask(cutoff: Int[Array, "E"]):
    open_to = allowed & (position[:, None] < cutoff[None, :]) & pending[:, None]
    best = jnp.argmax(jnp.where(open_to, scores, -jnp.inf), axis=-1).astype(jnp.int32)
    return best, jnp.any(open_to, axis=-1)

  def round_of(state):
    cutoff, _ = state
    best, ok = ask(cutoff)
    experts, places, _ = jax.lax.sort(
      (jnp.where(ok, best, num_experts), position, token), num_keys=2
    )
    bounds = jnp.arange(num_experts, dtype=jnp.int32)
    first_refused = jnp.searchsorted(experts, bounds).astype(jnp.int32) + room
    inside = jnp.minimum(first_refused, num_tokens - 1)
    too_many = (first_refused < num_tokens) & (experts[inside] == bounds)
    new = jnp.where(too_many, places[inside], cutoff)
    return new, jnp.any(new != cutoff)

  start = jnp.where(room > 0, never, -1)
  # Made of `room`, so that the carry varies over the devices as the result does.
  again = jnp.ones_like(room[0], bool)
  cutoff, _ = jax.lax.while_loop(lambda s: s[1], round_of, (start, again))
  return ask(cutoff)
