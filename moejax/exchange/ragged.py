"""Sends exactly each expert's rows to its device and back, for any load.

Carries sorted rows; `runs` sends them. A bounded buffer (`exchange_buffer`) drops the
rows that do not fit, and counts them. An unbounded one is mostly empty; tokens sent in
several parts (`exchange_chunks`) need room for one part at a time. Runs inside a
`jax.shard_map`.

Letters: G groups of this device, T tokens of a group, D width, E experts, K choices per
token, P devices of the expert axis, L = E/P local experts, A rows of this device, R rows
of its buffer.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moejax.config.exchange_rule import buffer_factor
from moejax.dispatch.base import Layout
from moejax.dispatch.rows import Rows
from moejax.exchange import runs
from moejax.exchange.base import AXIS, SAVED_NAME, Lost, Options
from moejax.experts import permute
from moejax.experts.grouped_matmul import apply_ragged_experts
from moejax.experts.weights import ExpertWeights
from moejax.platform import target_platform
from moejax.routing.placement import Assignments, Placement


def ragged(
  x: Float[Array, "G T D"],
  placement: Placement,
  layout: type[Layout],
  weights: ExpertWeights,
  options: Options,
) -> tuple[Float[Array, "G T D"], Lost]:
  """Sends rows in expert order to their devices, run by run, and back."""
  assert layout is Rows and isinstance(placement, Assignments), layout
  # The config is checked for training; evaluation may have another number of groups.
  parts = math.gcd(options.exchange_chunks, placement.num_groups)
  if parts == 1:
    return _at_once(x, placement, weights, options)

  # Weights are closed over, so that a part's residuals have no copy of them. They are in
  # float32, so that the gradients of all parts add up in float32.
  wide = jax.tree.map(lambda w: w.astype(jnp.float32), weights)

  def part(_: None, inputs: tuple[Array, Assignments]) -> tuple[None, Any]:
    narrow = jax.tree.map(lambda w, like: w.astype(like.dtype), wide, weights)
    return None, _at_once(*inputs, narrow, options)

  inputs = jax.tree.map(
    lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), (x, placement)
  )
  _, (y, lost) = jax.lax.scan(jax.checkpoint(part, prevent_cse=False), None, inputs)
  return y.reshape(x.shape), jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), lost)


def _at_once(
  x: Float[Array, "G T D"],
  placement: Assignments,
  weights: ExpertWeights,
  options: Options,
) -> tuple[Float[Array, "G T D"], Lost]:
  mine = Rows.of(placement)
  rows = mine.to_experts(x)
  room = buffer_rows(rows.shape[0], options.exchange_buffer, mine)
  offsets = runs.make_offsets(mine.load, AXIS, rows.shape[0], room)
  received = checkpoint_name(runs.send(rows, offsets), SAVED_NAME)
  # Gates travel with their rows, so that outputs come back weighted and the backward
  # pass needs no output: recomputing and resending it would serve only the gate.
  gate = checkpoint_name(runs.send(mine.gates(), offsets), SAVED_NAME)
  total = jnp.sum(offsets.received, axis=0)
  if offsets.received.shape[1] == 1 and target_platform() != "cpu":
    # With a single local expert all rows are its own, and already contiguous.
    out = apply_ragged_experts(
      received,
      total,
      weights,
      options.activation,
      gate=gate,
      chunks=options.expert_chunks,
    )
  else:
    here = Rows(moves=_in_experts_order(offsets, total), gate=gate, load=total)
    out = here.run(
      received, weights, activation=options.activation, chunks=options.expert_chunks
    )
  back = runs.send_back(out, offsets)
  y = mine.from_experts(back).reshape(x.shape)
  return y, _count_lost(placement, mine, offsets)


def buffer_rows(num_rows: int, bound: float | None, mine: Rows) -> int:
  """Returns R, the rows that a device can receive.

  Args:
    num_rows: A.
    bound: `exchange_buffer`.
    mine: the rows of this device.
  """
  factor = buffer_factor(
    bound,
    devices=jax.lax.axis_size(AXIS),
    num_experts=mine.load.shape[0],
    num_selected=mine.moves.num_selected,
  )
  return max(1, round(factor * num_rows))


def _in_experts_order(offsets: runs.Offsets, total: Int[Array, "L"]) -> permute.Moves:
  """Returns the moves that sort received rows, ordered by sender, into expert order."""
  place, row, used = runs.by_expert(offsets)
  index = jnp.arange(offsets.num_received, dtype=jnp.int32)
  return permute.Moves(
    token=index,
    place=place,
    kept=used,
    assignment=row,
    used=index < jnp.sum(total),
    num_tokens=offsets.num_received,
    num_selected=1,
  )


def _count_lost(placement: Assignments, rows: Rows, offsets: runs.Offsets) -> Lost:
  """Counts losses: the last `Offsets.lost` rows of each expert's run."""
  moves = rows.moves
  fits = jnp.cumsum(rows.load) - offsets.lost
  sent = moves.kept & (moves.place < fits[placement.expert.reshape(-1)])

  def served(assignments: Bool[Array, "A"]) -> Bool[Array, "T"]:
    none = jnp.zeros_like(assignments, shape=(moves.num_tokens,))
    return none.at[moves.token].max(assignments)

  tokens = served(moves.kept) & ~served(sent)
  return Lost(
    assignments=offsets.lost[None].astype(jnp.float32),
    tokens=jnp.sum(tokens.astype(jnp.float32))[None],
  )
