"""Splitting each expert's rows into blocks of a few static sizes.

A compiled matmul has a static number of rows, but an expert's load is known only at
run time. So each load is covered by blocks of a few sizes, chosen from a table built
at trace time that minimises the rows computed plus a fixed cost per block; the kernel
then runs one loop per size, with a dynamic trip count.

Letters: E experts, N assignments, Z block sizes, M maximum number of blocks.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from moejax.types import pytree, static_field

BLOCK_OVERHEAD = 16
"""Cost of an extra block, in rows: reading and packing the expert's weights again."""

NEAR, NEARER = (0.75, 1.0, 1.25), (0.75, 0.875, 1.0, 1.125, 1.25)
"""Block sizes around the mean load, as fractions of it."""

SMALL_MEAN = 128
"""Up to this mean load, padding costs more than compiling two more loops."""

FEW = (16, 4, 1)
"""Block sizes where most experts have one row or none, as in a step of generation. The
cost of one row is reading the expert's weights; up to eight rows cost little more."""

LARGEST = 512
"""Larger blocks are no faster per row, and need more padding."""


@pytree
class Blocks:
  """The blocks, sorted by size and then by expert."""

  expert: Int[Array, "M"]
  position: Int[Array, "M"]
  """The block's first assignment, in expert order."""
  count: Int[Array, "M"]
  """Assignments in the block, at most its size."""
  first: Bool[Array, "M"]
  """Whether the block holds its expert's first assignment. Larger blocks run first
  and come first within an expert, so none of the expert's blocks has run before."""
  bound: Int[Array, "Bounds"]
  """Blocks of size z are bound[z] <= m < bound[z + 1]."""
  sizes: tuple[int, ...] = static_field()


@functools.cache
def cover(sizes: tuple[int, ...]) -> np.ndarray:
  """Returns the cheapest multiset of block sizes for each load up to the largest size.

  Args:
    sizes: descending.

  Returns:
    counts [largest + 1, Z]: how many blocks of each size cover a load.
  """
  largest = sizes[0]
  cost = np.zeros(largest + 1)
  counts = np.zeros((largest + 1, len(sizes)), np.int32)
  for load in range(1, largest + 1):
    options = [size + BLOCK_OVERHEAD + cost[max(0, load - size)] for size in sizes]
    best = int(np.argmin(options))
    cost[load] = options[best]
    counts[load] = counts[max(0, load - sizes[best])]
    counts[load, best] += 1
  return counts


def sizes_for(num_assignments: int, num_experts: int) -> tuple[int, ...]:
  """Returns the block sizes to compile, descending: at most eight, one loop each.

  Three or five are near the mean load, so that under a balanced router most experts
  need one block with little padding. The others keep a skewed load cheap.
  """
  if num_assignments <= 2 * num_experts:
    return tuple(size for size in FEW if size < 2 * num_assignments)
  mean = num_assignments / num_experts
  fractions = NEARER if mean <= SMALL_MEAN else NEAR
  near = (math.ceil(fraction * mean / 8) * 8 for fraction in fractions)
  sizes = {LARGEST, 128, 32} | {size for size in near if size <= LARGEST // 2}
  return tuple(sorted((s for s in sizes if s < 2 * num_assignments), reverse=True)) or (
    16,
  )


def make_blocks(
  load: Int[Array, "E"], num_assignments: int, sizes: tuple[int, ...]
) -> Blocks:
  """Covers every expert's load with blocks.

  Args:
    load: kept assignments per expert; their sum is at most `num_assignments`.
    sizes: block sizes, descending.
  """
  num_experts, largest = load.shape[0], sizes[0]
  table = cover(sizes)
  per_expert = int(table.sum(axis=1).max())
  num_blocks = num_assignments // largest + num_experts * per_expert
  counts = jnp.asarray(table)[load % largest]
  counts = counts.at[:, 0].add(load // largest)
  size = jnp.asarray(sizes, jnp.int32)
  rows = counts * size[None, :]
  start = jnp.cumsum(load) - load
  before = jnp.cumsum(rows, axis=1) - rows  # Larger blocks come first in an expert.
  ends = jnp.cumsum(counts.T.reshape(-1))
  block = jnp.arange(num_blocks, dtype=jnp.int32)
  cell = jnp.searchsorted(ends, block, side="right").astype(jnp.int32)
  cell = jnp.minimum(cell, ends.shape[0] - 1)
  kind, expert = cell // num_experts, cell % num_experts
  nth = block - (ends - counts.T.reshape(-1))[cell]
  offset = before.T.reshape(-1)[cell] + nth * size[kind]
  bound = jnp.concatenate(
    [jnp.zeros((1,), jnp.int32), ends[num_experts - 1 :: num_experts]]
  )
  return Blocks(
    expert=expert,
    position=start[expert] + offset,
    count=jnp.minimum(size[kind], load[expert] - offset),
    first=offset == 0,
    bound=bound.astype(jnp.int32),
    sizes=sizes,
  )
