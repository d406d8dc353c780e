"""Overflow: what happens to an assignment whose expert has no slot left.

next_best: in queue order, each goes to its token's best expert that has room and does
not already serve the token, if any. This is a serial dictatorship; since all experts
rank tokens by the same queue, it is also the unique stable matching, and is found in a
few parallel rounds instead of one step per assignment. In a round, each unplaced token
requests the best expert that has not rejected it, and an expert with more requests than
room rejects all from the first excess request on. Each round settles at least the expert
that fills up first, so there are at most E rounds.

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
    kept: assignments that have a slot.
    overflowed: assignments that need one.
    scores: ranking of experts per token; -inf marks an expert that may not be taken.
    room: slots left per expert.
    position: place in the queue; choice-major, so that all first choices come before
      all second ones.

  Returns:
    expert: the new expert where placed, else the old one.
    placed: which overflowed assignments were placed.
  """
  scores = jax.lax.stop_gradient(scores)
  index = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, :]
  allowed = scores > -jnp.inf
  for k in range(expert.shape[-1]):
    allowed &= ~((index == expert[:, k : k + 1]) & kept[:, k : k + 1])
  columns, placed = [], []
  for k in range(expert.shape[-1]):
    pending, places = overflowed[:, k], position.size
    found, ok = _match(scores, allowed, pending, position[:, k], room, places)
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
  num_places: int,
) -> tuple[Int[Array, "T"], Bool[Array, "T"]]:
  """Matches pending tokens to the experts' room by serial dictatorship.

  An expert's cutoff is the queue position from which on it rejects tokens. Positions are
  below `num_places`.
  """
  never = jnp.iinfo(jnp.int32).max
  num_tokens, num_experts = scores.shape
  bits = max(1, (num_places - 1).bit_length())
  fits = (num_experts + 1) << bits <= 2**31

  def in_line(expert: Int[Array, "T"]) -> tuple[Int[Array, "T"], Int[Array, "T"]]:
    """Returns experts and places of all tokens, sorted by both."""
    if not fits:
      experts, places = jax.lax.sort((expert, position), num_keys=2)
      return experts, places
    packed = jnp.sort((expert << bits) | position)
    return packed >> bits, packed & ((1 << bits) - 1)

  def ask(cutoff: Int[Array, "E"]):
    open_to = allowed & (position[:, None] < cutoff[None, :]) & pending[:, None]
    best = jnp.argmax(jnp.where(open_to, scores, -jnp.inf), axis=-1).astype(jnp.int32)
    return best, jnp.any(open_to, axis=-1)

  def round_of(state):
    cutoff, _ = state
    best, ok = ask(cutoff)
    experts, places = in_line(jnp.where(ok, best, num_experts))
    bounds = jnp.arange(num_experts, dtype=jnp.int32)
    first_refused = jnp.searchsorted(experts, bounds).astype(jnp.int32) + room
    inside = jnp.minimum(first_refused, num_tokens - 1)
    too_many = (first_refused < num_tokens) & (experts[inside] == bounds)
    new = jnp.where(too_many, places[inside], cutoff)
    return new, jnp.any(new != cutoff)

  start = jnp.where(room > 0, never, -1)
  # Derived from `room`, so that the carry varies over devices as the result does.
  again = jnp.ones_like(room[0], bool)
  cutoff, _ = jax.lax.while_loop(lambda s: s[1], round_of, (start, again))
  return ask(cutoff)
