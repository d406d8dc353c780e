"""The axes of a mesh and their sizes; needs no devices."""

import math
from collections.abc import Mapping

from moejax.config import MeshConfig
from moejax.errors import ConfigError

AXES = ("data", "fsdp", "expert", "tensor")


def token_shards(sizes: Mapping[str, int]) -> int:
  """Returns the number of devices that the tokens of a batch are sharded over."""
  return sizes["data"] * sizes["fsdp"] * sizes["expert"]


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
  """Returns the sizes of `AXES` on `num_devices`; a single -1 takes the rest.

  Raises:
    ConfigError: an invalid size, or a product that cannot equal the device count.
  """
  sizes = [getattr(config, axis) for axis in AXES]
  flags = " ".join(f"--config.mesh.{a}={s}" for a, s in zip(AXES, sizes, strict=True))
  if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
    raise ConfigError(
      f"{flags}: every axis is a positive number of devices, and at most one may be -1 "
      "(which takes what the others leave)."
    )
  known = math.prod(s for s in sizes if s != -1)
  if -1 in sizes and num_devices % known == 0:
    sizes[sizes.index(-1)] = num_devices // known
  if math.prod(sizes) != num_devices:
    raise ConfigError(
      f"{flags}: {num_devices} device(s) cannot be divided this way. The product of axes "
      "must equal the device count; set one axis to -1 to let it take the rest."
    )
  return tuple(sizes)
