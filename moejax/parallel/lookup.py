"""Looking up a table that is cut over devices, by tokens that are cut over others.

Left to itself the compiler all-reduces the gradient of the whole table. Here each device
gathers the width over `fsdp`, whose transpose is a reduce-scatter, looks up the ids that
its part of the vocabulary holds, and adds up over `tensor`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from moejax.parallel.mesh import TOKEN_AXES, num_token_shards


def lookup(
  table: Float[Array, "V D"], tokens: Int[Array, "B S"], dtype: Any
) -> Float[Array, "B S D"]:
  """table[tokens] in another dtype; its gradient adds up in the table's own.

  Args:
    table: the vocabulary cut over `tensor`, the width over `fsdp`.
    tokens: ids below V.
    dtype: of the result.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or tokens.shape[0] % num_token_shards(mesh):
    return jnp.take(table, tokens, axis=0).astype(dtype)

  def local(table: Array, tokens: Array) -> Array:
    # Said before the gather, so that gradients are scattered before they are summed.
    for axis in ("data", "expert"):
      table = jax.lax.pcast(table, axis, to="varying")
    table = jax.lax.all_gather(table, "fsdp", axis=1, tiled=True)
    index = tokens - jax.lax.axis_index("tensor") * table.shape[0]
    here = (index >= 0) & (index < table.shape[0])
    rows = jnp.take(table, jnp.clip(index, 0, table.shape[0] - 1), axis=0)
    rows = jnp.where(here[..., None], rows, jnp.zeros((), rows.dtype)).astype(dtype)
    return jax.lax.psum(rows, "tensor")

  return jax.shard_map(
    local,
    in_specs=(PartitionSpec("tensor", "fsdp"), PartitionSpec(TOKEN_AXES)),
    out_specs=PartitionSpec(TOKEN_AXES),
  )(table, tokens)
