"""The device mesh, made in one place.

Axes, outermost first: `data` (replicas), `fsdp` (parameters and optimizer state
are cut), `expert` (experts are cut; elsewhere a data axis), `tensor` (heads and
hidden widths are cut).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Float

from moejax.config import MeshConfig
from moejax.config.mesh import AXES, mesh_shape
from moejax.errors import ConfigError

TOKEN_AXES = ("data", "fsdp", "expert")
"""A batch is cut over these: outside the MoE layer the expert axis is a data axis."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over all devices (or those given), in the order the hardware suggests."""
  devices = list(jax.devices() if devices is None else devices)
  shape = mesh_shape(config, len(devices))
  return Mesh(_placed(config, shape, devices), AXES, axis_types=(AxisType.Auto,) * 4)


def num_slices(devices: Sequence[Any]) -> int:
  """Groups of TPUs that a fast network joins inside and a slow one outside."""
  return len({getattr(device, "slice_index", 0) for device in devices})


def _placed(config: MeshConfig, shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
  """Devices in the mesh's shape, neighbours on an axis being neighbours in hardware.

  Raises:
    ConfigError: the axis that is to cross slices cannot.
  """
  slices = num_slices(devices)
  if slices > 1:
    across = AXES.index(config.slice_axis)
    if shape[across] % slices:
      raise ConfigError(
        f"--config.mesh.{config.slice_axis}={shape[across]} is to cross {slices} slices "
        f"(--config.mesh.slice_axis={config.slice_axis}), and is no multiple of them. "
        f"Make it a multiple of {slices}, or choose another slice_axis."
      )
    outer = tuple(slices if i == across else 1 for i in range(len(shape)))
    inner = tuple(a // b for a, b in zip(shape, outer, strict=True))
    place: Any = functools.partial(
      mesh_utils.create_hybrid_device_mesh, inner, outer, devices
    )
  else:
    place = functools.partial(mesh_utils.create_device_mesh, shape, devices)
  try:
    return place()
  except NotImplementedError:
    # Axes that are no products of whole sides of the torus share a side.
    return place(allow_split_physical_axes=True)
  except AssertionError:
    # Some devices of a slice, which leave holes in its torus.
    return np.asarray(devices).reshape(shape)


BY_HAND = "moejax_by_hand"
"""The named scope of every collective that moejax asks for itself; all others are the
compiler's (`moejax.hlo.intended`)."""


def mesh_in_scope() -> AbstractMesh | None:
  """The mesh of `jax.set_mesh`, if it has more than one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def shard_map(function: Callable[..., Any], **specs: Any) -> Callable[..., Any]:
  """`jax.shard_map` over the mesh in scope, whose collectives are known to be ours."""
  mapped = jax.shard_map(function, **specs)

  def call(*arguments: Any) -> Any:
    # Around it and not inside, so that what its transpose sends has the name too.
    with jax.named_scope(BY_HAND):
      return mapped(*arguments)

  return call


def on_tokens(x: Float[Array, "B *rest"]) -> Float[Array, "B *rest"]:
  """Says that activations are cut as the batch is, whatever their weights are cut by.

  Left to itself the compiler may cut them over their width like an `fsdp` weight, and
  move activations where it should gather weights.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or x.shape[0] % num_token_shards(mesh):
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(TOKEN_AXES))


def num_token_shards(mesh: Mesh | AbstractMesh) -> int:
  """Over how many devices the tokens of a batch are cut."""
  return math.prod(mesh.shape[axis] for axis in TOKEN_AXES)


def is_cut_over(name: str) -> bool:
  """Inside a `jax.shard_map`: whether an axis has devices to gather from.

  With one alone nothing would move, but XLA:CPU would still lay out the operand anew,
  copy it and lay it out back, and the same for the transpose.
  """
  return jax.lax.axis_size(name) > 1
