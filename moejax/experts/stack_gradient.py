"""The gradient of a stack of expert matrices on TPU, as a Pallas kernel.

With rows in expert order, each expert needs rows^T grad over its own run. The compiler
implements this ragged contraction as one masked matmul over all rows for each expert, E
times the work. Here the grid's last dimension iterates over (expert, tile of rows)
pairs, visiting a tile shared by two runs once for each, and ends with the last run: the
rest of the buffer costs nothing. The idea is from MegaBlocks (arXiv:2211.15841); jax's
version of its kernel (megablox.tgmm) does not run under a `jax.shard_map` that checks
over which axes values vary.

Letters: N rows, D width of rows, F width of gradients, E experts, M rows of a tile.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_ROW_TILES = (512, 256, 128)
_D_TILE, _F_TILE = 512, 1024
"""Two double-buffered operands and a float32 sum of these sizes take 6 MB on chip."""


def stack_gradient(
  rows: Float[Array, "N D"],
  grad: Float[Array, "N F"],
  sizes: Int[Array, "E"],
  *,
  interpret: bool = False,
) -> Float[Array, "E D F"]:
  """Sums row^T grad over each expert's rows, in float32, returned in rows' dtype.

  Args:
    rows: in expert order; rows after the last run may hold anything.
    grad: likewise.
    sizes: lengths of the runs; zero gives a zero matrix.
    interpret: runs the kernel without a TPU, slowly, for tests.
  """
  # Imported late: importing Pallas for TPUs takes a second, which CPU runs should avoid.

  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  tile = next((t for t in _ROW_TILES if rows.shape[0] % t == 0), None)
  if tile is None:
    tile = _ROW_TILES[-1]
    padding = ((0, -rows.shape[0] % tile), (0, 0))
    rows, grad = jnp.pad(rows, padding), jnp.pad(grad, padding)
  d_tile, f_tile = min(_D_TILE, rows.shape[1]), min(_F_TILE, grad.shape[1])
  expert, row_tile, bounds, num_steps = order_steps(sizes, rows.shape[0] // tile, tile)
  # Derived from the operands, so that it varies over the mesh as they do.
  shape = jax.eval_shape(
    lambda r, g, s: jnp.zeros_like(s, r.dtype)[:, None, None] + (r.T @ g)[None],
    rows,
    grad,
    sizes,
  )

  grid = pltpu.PrefetchScalarGridSpec(
    num_scalar_prefetch=3,
    grid=(pl.cdiv(rows.shape[1], d_tile), pl.cdiv(grad.shape[1], f_tile), num_steps),
    in_specs=[
      pl.BlockSpec((tile, d_tile), lambda d, f, s, expert, row, bounds: (row[s], d)),
      pl.BlockSpec((tile, f_tile), lambda d, f, s, expert, row, bounds: (row[s], f)),
    ],
    out_specs=pl.BlockSpec(
      (None, d_tile, f_tile), lambda d, f, s, expert, row, bounds: (expert[s], d, f)
    ),
    scratch_shapes=[pltpu.VMEM((d_tile, f_tile), jnp.float32)],
  )
  products = 2 * rows.shape[0] * rows.shape[1] * grad.shape[1]
  return pl.pallas_call(
    _kernel(tile),
    out_shape=shape,
    grid_spec=grid,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    cost_estimate=pl.CostEstimate(
      flops=products,
      transcendentals=0,
      bytes_accessed=2 * (rows.size + grad.size + shape.size),
    ),
    interpret=interpret,
    name="ragged_dot_stack_gradient",
  )(expert, row_tile, bounds, rows, grad)


def _kernel(tile: int) -> Callable[..., None]:
  """Returns the kernel of one step: adds a tile of M = `tile` rows to its expert's sum,
  which is zeroed at the expert's first step and written at its last."""
  from jax.experimental import pallas as pl

  def kernel(expert, row_tile, bounds, rows, grad, out, total):
    step, steps = pl.program_id(2), pl.num_programs(2)
    here = expert[step]
    start, end = bounds[here], bounds[here + 1]
    first_row = row_tile[step] * tile

    @pl.when((step == 0) | (expert[jnp.maximum(step - 1, 0)] != here))
    def _():
      total[...] = jnp.zeros_like(total)

    def add(rows: Array, grad: Array) -> None:
      total[...] += jax.lax.dot_general(
        rows, grad, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
      )

    whole = (start <= first_row) & (first_row + tile <= end)

    @pl.when(whole)
    def _():
      add(rows[...], grad[...])

    @pl.when(~whole & (start < end))
    def _():
      # A select in float32: masks of half-precision values have another layout. On both
      # operands, since rows outside this run may be NaN.
      def mine(block: Array) -> Array:
        index = jax.lax.broadcasted_iota(jnp.int32, block.shape, 0) + first_row
        inside = (index >= start) & (index < end)
        zero = jnp.zeros(block.shape, jnp.float32)
        return jnp.where(inside, block.astype(jnp.float32), zero).astype(block.dtype)

      add(mine(rows[...]), mine(grad[...]))

    @pl.when((step == steps - 1) | (expert[jnp.minimum(step + 1, steps - 1)] != here))
    def _():
      out[...] = total[...].astype(out.dtype)

  return kernel


def order_steps(
  sizes: Int[Array, "E"], num_tiles: int, tile: int
) -> tuple[Int[Array, "P"], Int[Array, "P"], Int[Array, "E+1"], Int[Array, ""]]:
  """Returns the (expert, tile of rows) pairs to visit, in expert order.

  Args:
    sizes: lengths of the runs.
    num_tiles: tiles of all rows.
    tile: M.

  Returns:
    The expert and the tile of each step, P = tiles + E steps of which the first
    `num_steps` are used; the start of each run; and `num_steps`. An empty run has one
    step, which writes its zeros.
  """
  num_experts = sizes.shape[0]
  ends = jnp.cumsum(sizes)
  bounds = jnp.concatenate([jnp.zeros((1,), sizes.dtype), ends])
  first = bounds[:-1] // tile
  last = jnp.maximum(ends - 1, bounds[:-1]) // tile
  visits = jnp.where(sizes > 0, last - first + 1, 1)
  step_ends = jnp.cumsum(visits)
  step = jnp.arange(num_tiles + num_experts, dtype=sizes.dtype)
  expert = jnp.sum((step_ends[None, :] <= step[:, None]).astype(sizes.dtype), axis=1)
  expert = jnp.minimum(expert, num_experts - 1)
  row_tile = first[expert] + step - (step_ends - visits)[expert]
  row_tile = jnp.clip(row_tile, 0, num_tiles - 1)
  return expert, row_tile, bounds, step_ends[-1]
