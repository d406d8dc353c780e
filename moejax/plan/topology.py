"""Machines that need not exist: what their chips can do, and devices to compile for.

`v5p:4x4x8` is a slice of 128 TPUs, `h100:4x8` four nodes of eight GPUs, `cpu:8` eight
fake devices of this machine. Compilers need descriptions only; the extra `tpu` brings
the one for TPUs (libtpu), the extra `cuda` the one for GPUs.

Figures of a chip are its maker's: TPUs from Google's system architecture pages and
"How to Scale Your Model" (Austin et al. 2025, chapters 2 and 12), GPUs from NVIDIA's
data sheets and XLA's own device descriptions.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from moejax.errors import ConfigError, UserError, did_you_mean

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """What one device, as jax counts them, can do."""

  family: str
  """tpu, gpu or cpu."""
  hbm_bytes: int
  flops: float
  """Of bfloat16 products, per second."""
  hbm_bandwidth: float
  """Bytes per second."""
  link_bandwidth: float
  """Bytes per second that it can send: on a TPU in one direction of one link, of which
  each side of the torus has two; on a GPU to its node."""
  slow_bandwidth: float
  """Bytes per second that it can send to another slice (TPU) or node (GPU)."""


CHIPS: dict[str, Chip] = {
  "v4": Chip(
    family="tpu",
    hbm_bytes=32 * GIB,
    flops=275e12,
    hbm_bandwidth=1.23e12,
    link_bandwidth=45e9,
    slow_bandwidth=6.25e9,
  ),
  "v5e": Chip(
    family="tpu",
    hbm_bytes=16 * GIB,
    flops=197e12,
    hbm_bandwidth=0.82e12,
    link_bandwidth=45e9,
    slow_bandwidth=3.125e9,
  ),
  "v5p": Chip(
    family="tpu",
    hbm_bytes=95 * GIB,
    flops=459e12,
    hbm_bandwidth=2.765e12,
    link_bandwidth=90e9,
    slow_bandwidth=6.25e9,
  ),
  "v6e": Chip(
    family="tpu",
    hbm_bytes=32 * GIB,
    flops=918e12,
    hbm_bandwidth=1.64e12,
    link_bandwidth=90e9,
    slow_bandwidth=12.5e9,
  ),
  # Per chip; jax counts its two halves as devices of their own.
  "tpu7x": Chip(
    family="tpu",
    hbm_bytes=192 * GIB,
    flops=2307e12,
    hbm_bandwidth=7.37e12,
    link_bandwidth=100e9,
    slow_bandwidth=12.5e9,
  ),
  "h100": Chip(
    family="gpu",
    hbm_bytes=84_942_979_072,
    flops=989e12,
    hbm_bandwidth=3.35e12,
    link_bandwidth=450e9,
    slow_bandwidth=50e9,
  ),
  "h200": Chip(
    family="gpu",
    hbm_bytes=151_397_597_184,
    flops=989e12,
    hbm_bandwidth=4.8e12,
    link_bandwidth=450e9,
    slow_bandwidth=50e9,
  ),
  "cpu": Chip(
    family="cpu",
    hbm_bytes=0,
    flops=0.0,
    hbm_bandwidth=0.0,
    link_bandwidth=0.0,
    slow_bandwidth=0.0,
  ),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A machine by name."""

  kind: str
  """A key of `CHIPS`."""
  shape: tuple[int, ...]
  """Sides of the torus, (nodes, GPUs), or (devices,)."""
  slices: int = 1
  """Of that shape each, joined by the slow network."""

  def __str__(self) -> str:
    return f"{self.kind}:{'x'.join(map(str, self.shape))}"


def parse(text: str, slices: int = 1) -> Topology:
  """Reads `v5p:4x4x8`.

  Raises:
    ConfigError: no such kind, or no such shape of it.
  """
  kind, _, sides = text.partition(":")
  if kind not in CHIPS:
    raise ConfigError(
      f"--topology={text}: {did_you_mean(kind, CHIPS)} Name a kind and a shape, such as "
      "v5p:4x4x8, v5e:4x4, h100:4x8 (nodes x GPUs) or cpu:8."
    )
  dimensions = {"tpu": (2, 3), "gpu": (2,), "cpu": (1,)}[CHIPS[kind].family]
  shape = tuple(int(n) for n in sides.split("x")) if _SIDES.fullmatch(sides) else ()
  if len(shape) not in dimensions or 0 in shape:
    example = {"tpu": "4x4x8", "gpu": "4x8 (nodes x GPUs)", "cpu": "8"}
    raise ConfigError(
      f"--topology={text}: {sides!r} is no shape of {kind}; give one such as "
      f"{kind}:{example[CHIPS[kind].family]}."
    )
  if slices > 1 and CHIPS[kind].family != "tpu":
    raise ConfigError(
      f"--slices={slices}: only TPUs come in slices; give nodes in --topology={text}."
    )
  return Topology(kind, shape, slices)


_SIDES = re.compile(r"\d+(x\d+)*")


def prepare(topology: Topology) -> None:
  """Sets up this process for compiling; to be called before jax is imported.

  Raises:
    UserError: what the compiler for it needs is not installed.
  """
  family = CHIPS[topology.kind].family
  needs = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_cuda12_plugin", "cuda")}.get(family)
  if needs and importlib.util.find_spec(needs[0]) is None:
    raise UserError(
      f"--topology={topology}: compiling for it needs the package {needs[0]}, which is "
      f"not installed. Install the extra: pip install 'moejax[{needs[1]}]', in a "
      f"checkout pip install -e '.[{needs[1]}]'."
    )
  os.environ["JAX_PLATFORMS"] = "cpu"
  if family == "tpu":
    os.environ |= {
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_ACCELERATOR_TYPE": "v5p-8",
      "TPU_WORKER_HOSTNAMES": "localhost",
      # A second process would otherwise end on the lock that guards real chips.
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
      "TPU_MIN_LOG_LEVEL": os.environ.get("TPU_MIN_LOG_LEVEL", "3"),
    }


def devices_of(topology: Topology) -> list[Any]:
  """Devices to make a mesh of: descriptions, which hold no arrays.

  Raises:
    ConfigError: the compiler knows no such machine.
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
      f"--topology={topology}: the compiler knows no such machine: {reason}"
    ) from error
  return list(described.devices)


def chip_of(topology: Topology, devices: list[Any]) -> Chip:
  """Figures of one device, where a chip shows as several devices."""
  chip = CHIPS[topology.kind]
  parts = len(devices) // (math.prod(topology.shape) * topology.slices)
  if parts == 1:
    return chip
  return dataclasses.replace(
    chip,
    hbm_bytes=chip.hbm_bytes // parts,
    flops=chip.flops / parts,
    hbm_bandwidth=chip.hbm_bandwidth / parts,
    link_bandwidth=chip.link_bandwidth / parts,
    slow_bandwidth=chip.slow_bandwidth / parts,
  )


def island(topology: Topology, device: Any) -> int:
  """The slice or node that a device stands in."""
  if CHIPS[topology.kind].family == "gpu":
    return device.id // topology.shape[1]
  return getattr(device, "slice_index", 0)
