"""The device mesh.

Axes, outermost first: `data` (replicas), `fsdp` (shards parameters and optimizer
state), `expert` (shards experts; elsewhere a data axis), `tensor` (shards heads and
hidden widths).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Float

from moejax.config import MeshConfig
from moejax.config.mesh import AXES, mesh_shape, token_shards
from moejax.errors import ConfigError

TOKEN_AXES = ("data", "fsdp", "expert")
"""Axes that shard a batch: outside the MoE layer the expert axis is a data axis."""
TOKENS = PartitionSpec(TOKEN_AXES)
"""How a leading axis of sequences or of routing groups is sharded."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns a mesh over all (or the given) devices, ordered to match the hardware."""
  devices = list(jax.devices() if devices is None else devices)
  shape = mesh_shape(config, len(devices))
  return Mesh(_placed(config, shape, devices), AXES, axis_types=(AxisType.Auto,) * 4)


def num_slices(devices: Sequence[Any]) -> int:
  """Returns the number of TPU slices: fast network inside, slow one between them."""
  return len({getattr(device, "slice_index", 0) for device in devices})


def _placed(config: MeshConfig, shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
  """Arranges devices in the mesh's shape so that axis neighbours are close in hardware.

  Raises:
    ConfigError: the size of `slice_axis` is not a multiple of the number of slices.
  """
  slices = num_slices(devices)
  if slices > 1:
    outer = over_slices(config, shape, slices)
    inner = tuple(a // b for a, b in zip(shape, outer, strict=True))
    place: Any = functools.partial(
      mesh_utils.create_hybrid_device_mesh, inner, outer, devices
    )
  else:
    place = functools.partial(mesh_utils.create_device_mesh, shape, devices)
  try:
    return place()
  except NotImplementedError:
    # Axes that are not products of whole torus sides share a side.
    return place(allow_split_physical_axes=True)
  except AssertionError:
    # Only some devices of a slice, which leaves holes in its torus.
    return np.asarray(devices).reshape(shape)


def over_slices(
  config: MeshConfig, shape: tuple[int, ...], slices: int
) -> tuple[int, ...]:
  """Returns the part of each axis that spans slices: all of them along `slice_axis`.

  Raises:
    ConfigError: the size of `slice_axis` is not a multiple of the number of slices.
  """
  across = AXES.index(config.slice_axis)
  if shape[across] % slices:
    raise ConfigError(
      f"--config.mesh.{config.slice_axis}={shape[across]} must span {slices} slices "
      f"(--config.mesh.slice_axis={config.slice_axis}), but is not a multiple of "
      f"{slices}. Make it a multiple of {slices}, or choose another slice_axis."
    )
  return tuple(slices if i == across else 1 for i in range(len(shape)))


BY_HAND = "moejax_by_hand"
"""Named scope of every explicit collective of moejax; all others come from the
compiler (`moejax.hlo.intended`)."""

NEWTON_SCHULZ = "moejax_newton_schulz"
"""Named scope of Muon's iterations, to find them in the compiled program."""


def mesh_in_scope() -> AbstractMesh | None:
  """Returns the mesh of `jax.set_mesh`, or None if it has only one device.

  None, too, for somebody's own mesh without an `expert` axis: what runs there is left to
  the compiler, like any other layer.

  Raises:
    ConfigError: a mesh that experts cannot be spread over.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if not mesh.empty and mesh.size > 1 and _is_ours(mesh) else None


def _is_ours(mesh: AbstractMesh) -> bool:
  """Returns whether the mesh has an axis for experts; raises as `mesh_in_scope`."""
  explicit = [
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Explicit
  ]
  if explicit:
    raise ConfigError(
      f"The mesh in scope has axes of type Explicit ({', '.join(explicit)}), and moejax "
      "leaves shardings between its layers to the compiler. Give jax.make_mesh or Mesh "
      f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}."
    )
  missing = [axis for axis in AXES if axis not in mesh.shape]
  if missing and "expert" not in missing:
    raise ConfigError(
      f"The mesh in scope has the axes {', '.join(mesh.axis_names)}: spreading experts "
      f"over `expert` also needs {', '.join(missing)}, which may have size 1. Add them, "
      "or use moejax.sharding.mesh.make_mesh(MeshConfig(...))."
    )
  return not missing


def shard_map(function: Callable[..., Any], **specs: Any) -> Callable[..., Any]:
  """Returns `jax.shard_map` over the mesh in scope, in the named scope `BY_HAND`."""
  mapped = jax.shard_map(function, **specs)

  def call(*arguments: Any) -> Any:
    # Outside the shard_map, so that collectives of its transpose get the name too.
    with jax.named_scope(BY_HAND):
      return mapped(*arguments)

  return call


def on_tokens(x: Float[Array, "B *rest"]) -> Float[Array, "B *rest"]:
  """Constrains activations to be sharded like the batch, for any sharding of weights.

  Otherwise the compiler may shard them over their width like an `fsdp` weight, and move
  activations instead of gathering weights.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not _is_ours(mesh) or x.shape[0] % num_token_shards(mesh):
    return x
  return jax.lax.with_sharding_constraint(x, TOKENS)


def over_groups(
  function: Callable[[Any, Any], Any], mapped: Any, shared: Any, num_groups: int
) -> Any:
  """Computes function(mapped, shared), each device on its own groups.

  Args:
    function: returns trees whose leaves have a leading axis of groups.
    mapped: tree whose leaves have a leading axis of groups.
    shared: tree shared by all groups; replicated.
    num_groups: groups in `mapped`. If not divisible by the devices, all compute all.
  """
  mesh = mesh_in_scope()
  if mesh is None or num_groups % num_token_shards(mesh):
    return function(mapped, shared)
  run = shard_map(function, in_specs=(TOKENS, PartitionSpec()), out_specs=TOKENS)
  return run(mapped, shared)


def num_token_shards(mesh: Mesh | AbstractMesh) -> int:
  """Returns the number of devices that the tokens of a batch are sharded over."""
  return token_shards(mesh.shape)


def is_cut_over(name: str) -> bool:
  """Returns whether an axis has several devices; inside a `jax.shard_map`.

  With a single device nothing would move, but XLA:CPU would still change the operand's
  layout, copy it and change it back, and likewise for the transpose.
  """
  return jax.lax.axis_size(name) > 1
