"""Sharding rules: one table from logical dimension to mesh axis.

Each parameter names its dimensions next to its shape (moejax/layers); this table
maps them to mesh axes. A name not in the table, or a mesh axis used twice in one
array, is an error: a gap in the sharding rules must not be silent.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, Shaped

from moejax.errors import ConfigError
from moejax.sharding.mesh import TOKEN_AXES, num_token_shards

LogicalAxes = tuple[str | None, ...]
"""Names of an array's dimensions."""

STACKED = ("layer", "expert")
"""Dimensions along which matrices are stacked: every layer and expert has its own."""


def is_axes(node: Any) -> bool:
  """Returns whether a node of a tree of logical axes is a leaf."""
  return isinstance(node, tuple)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
  """Mesh axis of each logical dimension; None means replicated."""

  layer: str | None = None
  """The stacked axis of repeated blocks."""
  width: str | None = "fsdp"
  """D."""
  hidden: str | None = "tensor"
  """F, of experts and dense layers."""
  heads: str | None = "tensor"
  kv_heads: str | None = "tensor"
  head_dim: str | None = None
  latent: str | None = None
  """A latent dimension where it is an output: all heads read the whole vector."""
  rank: str | None = "fsdp"
  """The same dimension in the matrix that expands it to heads."""
  vocab: str | None = "tensor"
  expert: str | None = "expert"
  """E, of expert weights."""
  router_expert: str | None = None
  """E, of the router's own parameters: every device scores all experts."""
  norm: str | None = None

  def spec(self, axes: LogicalAxes) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these logical dimensions."""
    names = [None if a is None else self._axis(a) for a in axes]
    used = [n for n in names if n is not None]
    if len(set(used)) != len(used):
      raise ValueError(f"dimensions {axes} map to {names}: a mesh axis is used twice")
    return PartitionSpec(*names)

  def _axis(self, name: str) -> str | None:
    try:
      return getattr(self, name)
    except AttributeError:
      known = ", ".join(f.name for f in dataclasses.fields(self))
      raise ValueError(
        f"unknown logical dimension {name!r}; ShardingRules knows {known}"
      ) from None


RULES = ShardingRules()


def shardings(
  mesh: Mesh | AbstractMesh, logical_axes: Any, shapes: Any, rules: ShardingRules = RULES
) -> Any:
  """Returns the sharding of every parameter.

  Args:
    mesh: from `make_mesh`, or the sizes alone.
    logical_axes: tree of tuples of names, one per dimension.
    shapes: same tree, of anything with a `.shape`.
    rules: the table.

  Returns:
    The same tree, of NamedSharding.

  Raises:
    ConfigError: a dimension is not divisible by the mesh axis that shards it.
  """

  def one(path: Any, axes: LogicalAxes, leaf: Any) -> NamedSharding:
    spec = rules.spec(axes)
    for size, name, axis in zip(leaf.shape, axes, spec, strict=True):
      if axis is not None and size % mesh.shape[axis]:
        raise ConfigError(
          f"--config.mesh.{axis}={mesh.shape[axis]} does not divide the {name} dimension "
          f"({size}) of {jax.tree_util.keystr(path, simple=True, separator='.')}. "
          f"Choose a divisor of {size}, or change the model's size."
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, logical_axes, shapes, is_leaf=is_axes)


def like_parameters(mesh: Mesh, tree: Any, params: Any, param_shardings: Any) -> Any:
  """Returns shardings of a tree with copies of the parameters (optimizer state).

  A leaf whose path ends in a parameter's path and which has that parameter's shape is
  sharded like it; anything else (counts, factored moments) is replicated.
  """

  def names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((k,), simple=True) for k in path)

  known = {
    names(path): (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(param_shardings),
      strict=True,
    )
  }

  def one(path: Any, leaf: Any) -> NamedSharding:
    parts = names(path)
    for start in range(len(parts)):
      shape, sharding = known.get(parts[start:], (None, None))
      if sharding is not None and shape == leaf.shape:
        return sharding
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays [B, ...]: the batch over all token axes."""
  return NamedSharding(mesh, PartitionSpec(TOKEN_AXES))


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, "b"]:
  """Returns the rows of a global batch that this process's devices hold, ascending.

  Derived from the mesh, not from the process index: processes that differ only along
  `tensor` hold the same rows, and on some hardware a process's rows are not contiguous.
  """
  held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  blocks = {index[0].indices(batch_size) for index in held.values() if index}
  return np.concatenate([np.arange(*block) for block in sorted(blocks)])


def put_rows(mesh: Mesh, rows: Shaped[np.ndarray, "b *rest"]) -> jax.Array:
  """Returns the global array [B, ...]; this process contributes its `local_rows`."""
  sharding = batch_sharding(mesh)
  if sharding.is_fully_addressable:
    return jax.device_put(rows, sharding)
  num_blocks = num_token_shards(mesh)
  here = local_rows(mesh, num_blocks)
  size = len(rows) // len(here)

  def block(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None  # Each device of this process holds a part.
    nth = np.searchsorted(here, (index[0].start or 0) // size)
    return rows[nth * size : (nth + 1) * size]

  shape = (num_blocks * size, *rows.shape[1:])
  return jax.make_array_from_callback(shape, sharding, block)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())
