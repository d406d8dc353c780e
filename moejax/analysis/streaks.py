"""How steadily neighbouring tokens use the same experts, as sums of one batch.

Both measures show what it would cost to keep only some experts in fast memory. A segment
is m neighbouring tokens of a sequence. Documents of a packed sequence are not separated,
as in a server that processes one after the other.

  best set   the s experts that a segment uses most: the share of its assignments that
             they cover (SRP of arXiv:2505.16056, section 3, summed over segments)
  cache      a request hits if its expert was used recently enough: the least recently
             used is evicted. An expert's distance is the number of experts used more
             recently; a cache of s experts hits where the distance is below s (Mattson
             1970), so one histogram serves all sizes

Letters: L MoE layers, B batch, S sequence, E experts, K choices per token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

SEGMENTS = (16, 64)
"""Lengths m of segments, in tokens."""


def sums(served: Bool[Array, "L B S E"], valid: Bool[Array, "B S"]) -> dict[str, Array]:
  """Returns the sums of a batch, for `measures.consistency`.

  Returns:
    covered_m: float [L, E], for each m: assignments covered by a segment's s = 1, 2, ...
      most used experts.
    assignments_m: [L], those of all segments.
    segments_m: number of segments. Only those without padding count.
    distance: [L, E+1], requests by distance; the last counts first uses in a sequence.
  """
  found: dict[str, Array] = {}
  length = served.shape[2]
  for size in SEGMENTS:
    if size > length:
      continue
    used = length // size * size
    whole = valid[:, :used].reshape(-1, used // size, size).all(axis=-1)
    counts = served[:, :, :used].reshape(*served.shape[:2], -1, size, served.shape[-1])
    counts = jnp.sum(counts & whole[None, ..., None, None], axis=3, dtype=jnp.int32)
    best = -jnp.sort(-counts, axis=-1)
    covered = jnp.sum(jnp.cumsum(best, axis=-1), axis=(1, 2))
    found[f"covered_{size}"] = covered
    found[f"assignments_{size}"] = covered[:, -1]
    found[f"segments_{size}"] = jnp.sum(whole, dtype=jnp.int32)
  found["distance"] = distances(served)
  return found


def distances(served: Bool[Array, "L B S E"]) -> Int[Array, "L D"]:
  """Counts requests by the number of experts used more recently; D = E+1."""
  num_experts, length = served.shape[-1], served.shape[2]
  index = jnp.arange(length, dtype=jnp.int32)[:, None]
  used = jnp.where(served, index[None, None], -1)
  upto = jax.lax.cummax(used, axis=2)
  # The last use before each token; -1 means none.
  last = jnp.pad(upto[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=-1)
  # Of experts used by the same token, the lower index counts as the more recent.
  expert = jnp.arange(num_experts, dtype=jnp.int32)[None, None, None]
  rank = last * num_experts - expert
  place = jnp.where(last < 0, num_experts, _place(-rank))

  def count(place: Int[Array, "B S E"], served: Bool[Array, "B S E"]) -> Array:
    return jax.ops.segment_sum(
      served.reshape(-1).astype(jnp.int32), place.reshape(-1), num_experts + 1
    )

  return jax.vmap(count)(place, served)


def best_hits(
  served: Bool[Array, "L B S E"], valid: Bool[Array, "B S"], size: int
) -> Int[Array, "L"]:
  """Counts requests that the best possible cache of `size` experts would serve.

  After each token it keeps that token's experts and, of the others, those that are used
  again soonest (Belady 1966). No cache that must hold a token's experts together is
  better. Every sequence begins with an empty cache. `size` is at least K.
  """
  length, num_experts = served.shape[2], served.shape[-1]
  steps = jnp.moveaxis(served & valid[None, ..., None], 2, 0)
  index = jnp.arange(length, dtype=jnp.int32)[:, None, None, None]
  own = jnp.where(steps, index, length)
  after = jax.lax.cummin(own, axis=0, reverse=True)
  next_use = jnp.concatenate([after[1:], jnp.full_like(after[:1], length)])

  def step(state: tuple[Array, Array], now: tuple[Array, Array]) -> tuple[Any, None]:
    cache, hits = state
    wanted, next_use = now
    hits = hits + jnp.sum(cache & wanted, axis=(1, 2), dtype=jnp.int32)
    there = cache | wanted
    # The token's own experts first, then by next use.
    key = jnp.where(wanted, -1, jnp.where(there, next_use, length + 1))
    key = key * num_experts + jnp.arange(num_experts, dtype=jnp.int32)[None, None]
    return (there & (_place(key) < size), hits), None

  empty = jnp.zeros_like(steps[0])
  start = (empty, jnp.zeros(served.shape[0], jnp.int32))
  (_, hits), _ = jax.lax.scan(step, start, (steps, next_use))
  return hits


def _place(key: Int[Array, "*n E"]) -> Int[Array, "*n E"]:
  """Returns the place of each key in ascending order; keys of a row are distinct.

  Uses counting, which is several times faster than sorting for tens of experts.
  """
  below = key[..., None, :] < key[..., :, None]
  return jnp.sum(below, axis=-1, dtype=jnp.int32)
