"""Machines that need not exist: their names, and devices to compile for.

`v5p:4x4x8` is a slice of 128 TPUs, `h100:4x8` four nodes of eight GPUs, `cpu:8` eight
fake devices of this machine. Compilers need only descriptions; the extra `tpu` installs
the TPU compiler (libtpu), the extra `cuda` the GPU compiler.

Chip specifications are in `moejax.cost.chips`.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from moejax.cost.chips import CHIPS, Chip
from moejax.errors import ConfigError, UserError, did_you_mean

COMPILED_FOR = ("v4", "v5e", "v5p", "v6e", "tpu7x", "h100", "h200", "cpu")
"""Names in `CHIPS` that can be compiled for."""


@dataclasses.dataclass(frozen=True)
class Topology:
  """A machine: kind of chip, shape and slices."""

  kind: str
  """One of `COMPILED_FOR`."""
  shape: tuple[int, ...]
  """Torus dimensions, (nodes, GPUs per node), or (devices,)."""
  slices: int = 1
  """Number of slices of that shape, joined by the slow network."""

  def __str__(self) -> str:
    return f"{self.kind}:{'x'.join(map(str, self.shape))}"

  @property
  def name(self) -> str:
    """Name with the number of slices, such as `2 x v5p:4x4x4`."""
    return str(self) if self.slices == 1 else f"{self.slices} x {self}"

  @property
  def num_chips(self) -> int:
    """Chips of all slices."""
    return math.prod(self.shape) * self.slices

  @property
  def num_devices(self) -> int:
    """Number of jax devices; a chip may have two."""
    return self.num_chips * CHIPS[self.kind].devices


def parse(text: str, slices: int = 1) -> Topology:
  """Parses a name such as `v5p:4x4x8`.

  Raises:
    ConfigError: unknown kind, a shape that it cannot have, or slices of a non-TPU.
  """
  kind, _, sides = text.partition(":")
  if kind not in COMPILED_FOR:
    raise ConfigError(
      f"--topology={text}: {did_you_mean(kind, COMPILED_FOR)} Name a kind and a shape, "
      "such as v5p:4x4x8, v5e:4x4, h100:4x8 (nodes x GPUs) or cpu:8."
    )
  dimensions = {"tpu": (2, 3), "gpu": (2,), "cpu": (1,)}[CHIPS[kind].family]
  shape = tuple(int(n) for n in sides.split("x")) if _SIDES.fullmatch(sides) else ()
  if len(shape) not in dimensions or 0 in shape:
    example = {"tpu": "4x4x8", "gpu": "4x8 (nodes x GPUs)", "cpu": "8"}
    raise ConfigError(
      f"--topology={text}: {sides!r} is not a shape of {kind}; give one such as "
      f"{kind}:{example[CHIPS[kind].family]}."
    )
  if slices > 1 and CHIPS[kind].family != "tpu":
    raise ConfigError(
      f"--slices={slices}: only TPUs come in slices; give nodes in --topology={text}."
    )
  return Topology(kind, shape, slices)


_SIDES = re.compile(r"\d+(x\d+)*")


def prepare(topology: Topology) -> None:
  """Sets up this process for compiling; call it before importing jax.

  Raises:
    UserError: the package with the compiler is not installed.
  """
  family = CHIPS[topology.kind].family
  needs = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_cuda12_plugin", "cuda")}.get(family)
  if needs and importlib.util.find_spec(needs[0]) is None:
    raise UserError(
      f"--topology={topology}: compiling for it needs the package {needs[0]}, which is "
      f"not installed. Install the extra: pip install 'moejax[{needs[1]}]', in a "
      f"checkout pip install -e '.[{needs[1]}]'."
    )
  use_no_device()
  if family == "tpu":
    os.environ |= {
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_ACCELERATOR_TYPE": "v5p-8",
      "TPU_WORKER_HOSTNAMES": "localhost",
      # Otherwise a second process fails on the lock that guards real chips.
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
      "TPU_MIN_LOG_LEVEL": os.environ.get("TPU_MIN_LOG_LEVEL", "3"),
    }


def use_no_device() -> None:
  """Keeps jax from using this machine's accelerators; call it before importing jax."""
  os.environ["JAX_PLATFORMS"] = "cpu"


def devices_of(topology: Topology) -> list[Any]:
  """Returns devices for a mesh: except on CPU, descriptions that cannot hold arrays.

  Raises:
    ConfigError: the compiler does not know the machine.
  """
  import jax
  from jax.experimental import topologies

  family = CHIPS[topology.kind].family
  if family == "cpu":
    jax.config.update("jax_num_cpu_devices", topology.shape[0])
    return jax.devices()
  try:
    if family == "gpu":
      from moejax.plan.gpu_target import target_config

      nodes, gpus = topology.shape
      described = topologies.get_topology_desc(
        platform="cuda",
        topology=f"{nodes}x1x{gpus}",
        target_config=target_config(topology.kind),
      )
    else:
      extra = {"num_slices": topology.slices} if topology.slices > 1 else {}
      described = topologies.get_topology_desc(
        platform="tpu", topology_name=str(topology), **extra
      )
  except Exception as error:
    reason = str(error).splitlines()[0]
    raise ConfigError(
      f"--topology={topology}: the compiler does not know this machine: {reason}"
    ) from error
  return list(described.devices)


def chip_of(topology: Topology, devices: list[Any]) -> Chip:
  """Returns the figures of one device; a chip may have several."""
  return CHIPS[topology.kind].divided(
    len(devices) // (math.prod(topology.shape) * topology.slices)
  )


def island(topology: Topology, device: Any) -> int:
  """Returns the index of a device's slice or node."""
  if CHIPS[topology.kind].family == "gpu":
    return device.id // topology.shape[1]
  return getattr(device, "slice_index", 0)
