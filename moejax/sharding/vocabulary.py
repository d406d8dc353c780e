"""Sharded embedding lookup and output scores; a router scores experts the same way.

Tokens are sharded over the token axes, the vocabulary over `tensor`, the width over
`fsdp`. Otherwise the compiler all-reduces the gradient of a whole table, or scatters it
in uneven parts. Here each device gathers the width over `fsdp`, whose transpose is a
reduce-scatter, and works with its own part of the vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from moejax.sharding.mesh import (
  TOKEN_AXES,
  is_cut_over,
  mesh_in_scope,
  num_token_shards,
  shard_map,
)


def lookup(
  table: Float[Array, "V D"], tokens: Int[Array, "B S"], dtype: Any
) -> Float[Array, "B S D"]:
  """Returns table[tokens] in `dtype`; the gradient is summed in the table's dtype.

  Args:
    table: the vocabulary sharded over `tensor`, the width over `fsdp`.
    tokens: ids below V.
    dtype: of the result.
  """
  if not _is_cut(tokens):
    return jnp.take(table, tokens, axis=0).astype(dtype)

  def local(table: Array, tokens: Array) -> Array:
    table = _whole(table, axis=1)
    index = tokens - jax.lax.axis_index("tensor") * table.shape[0]
    here = (index >= 0) & (index < table.shape[0])
    rows = jnp.take(table, jnp.clip(index, 0, table.shape[0] - 1), axis=0)
    rows = jnp.where(here[..., None], rows, jnp.zeros((), rows.dtype)).astype(dtype)
    return jax.lax.psum(rows, "tensor")

  return shard_map(
    local,
    in_specs=(PartitionSpec("tensor", "fsdp"), PartitionSpec(TOKEN_AXES)),
    out_specs=PartitionSpec(TOKEN_AXES),
  )(table, tokens)


def score(
  x: Float[Array, "B S D"],
  head: Float[Array, "D V"],
  *,
  cut_over: str | None = "tensor",
  precision: jax.lax.Precision | None = None,
) -> Float[Array, "B S V"]:
  """Returns x @ head in float32, for any input dtype: scores of words or experts.

  Args:
    x: activations.
    head: in the dtype of x; the width sharded over `fsdp`.
    cut_over: the mesh axis that shards the words or experts.
    precision: of the matmul; None means the chip's default.
  """

  def local(x: Array, head: Array) -> Array:
    return jnp.einsum(
      "bsd,dv->bsv", x, head, precision=precision, preferred_element_type=jnp.float32
    )

  if not _is_cut(x):
    return local(x, head)
  return shard_map(
    lambda x, head: local(x, _whole(head, axis=0)),
    in_specs=(PartitionSpec(TOKEN_AXES), PartitionSpec("fsdp", cut_over)),
    out_specs=PartitionSpec(TOKEN_AXES, None, cut_over),
  )(x, head)


def _is_cut(batch: Shaped[Array, "B *rest"]) -> bool:
  """Returns whether there are several devices and they divide the batch evenly."""
  mesh = mesh_in_scope()
  return mesh is not None and batch.shape[0] % num_token_shards(mesh) == 0


def _whole(weight: Array, *, axis: int) -> Array:
  """Gathers the width; marked as varying first, so that gradients are scattered before
  they are summed over the other axes."""

  for name in ("data", "expert"):
    weight = jax.lax.pcast(weight, name, to="varying")
  if not is_cut_over("fsdp"):
    return weight
  return jax.lax.all_gather(weight, "fsdp", axis=axis, tiled=True)
