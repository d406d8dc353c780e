"""Google Cloud's names for the machines of a topology, and their number of processes.

Sources: the GKE page "Plan TPUs in GKE" (labels, chips of a virtual machine), the Cloud
TPU pages of each version (accelerator types, runtime versions), the GKE page "Run GPUs".
Read in November 2026; a cloud's names change without notice.
"""

import dataclasses
import math

from moejax.errors import UserError
from moejax.plan.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu:
  """One version of TPU."""

  label: str
  """Label of GKE nodes: cloud.google.com/gke-tpu-accelerator."""
  dimensions: int
  """Number of dimensions of a slice's shape."""
  small: tuple[int, ...] = ()
  """Sizes, in chips, of slices that are a single virtual machine of a special kind; other
  virtual machines have 4 chips."""
  type_name: str = ""
  """Beginning of the accelerator type of TPU VMs; empty if they are not offered."""
  counts_cores: bool = False
  """Whether the number in the accelerator type counts cores, two per chip."""
  runtime: str = ""
  """Runtime version of TPU VMs."""


TPUS = {
  "v4": Tpu(
    label="tpu-v4-podslice",
    dimensions=3,
    type_name="v4",
    counts_cores=True,
    runtime="tpu-ubuntu2204-base",
  ),
  "v5e": Tpu(
    label="tpu-v5-lite-podslice",
    dimensions=2,
    small=(1, 8),
    type_name="v5litepod",
    runtime="v2-alpha-tpuv5-lite",
  ),
  "v5p": Tpu(
    label="tpu-v5p-slice",
    dimensions=3,
    type_name="v5p",
    counts_cores=True,
    runtime="v2-alpha-tpuv5",
  ),
  "v6e": Tpu(
    label="tpu-v6e-slice",
    dimensions=2,
    small=(1, 8),
    type_name="v6e",
    runtime="v2-alpha-tpuv6e",
  ),
  "tpu7x": Tpu(label="tpu7x", dimensions=3),
}

GPU_LABELS = {"h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb"}
"""Labels of GKE nodes: cloud.google.com/gke-accelerator."""

_CHIPS_PER_HOST = 4
_GPUS_PER_NODE = 8

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
"""Shapes of three-dimensional slices, other than those made of whole 4x4x4 cubes."""


def check_shape(topology: Topology) -> None:
  """Refuses shapes that no cloud or vendor offers, though a compiler may know them.

  Raises:
    UserError: no slice or node of this kind has this shape.
  """
  kind, shape = topology.kind, topology.shape
  if kind not in TPUS:
    if len(shape) == 2 and shape[1] > _GPUS_PER_NODE:
      raise UserError(
        f"--topology={topology}: a node has at most {_GPUS_PER_NODE} GPUs (nodes x "
        f"GPUs), such as {kind}:{-(-shape[0] * shape[1] // _GPUS_PER_NODE)}x"
        f"{_GPUS_PER_NODE}."
      )
    return
  chips_per_host(topology)
  text = "x".join(map(str, shape))
  if TPUS[kind].dimensions == 2 and text not in _FLAT:
    raise UserError(
      f"--topology={topology}: slices of {kind} are {', '.join(_FLAT)}. Give one of "
      "them; --slices=N joins several."
    )
  cubes = all(side % 4 == 0 for side in shape)
  in_order = list(shape) == sorted(shape)
  if TPUS[kind].dimensions == 3 and text not in _SMALL and not (cubes and in_order):
    raise UserError(
      f"--topology={topology}: slices of {kind} are {', '.join(_SMALL)}, or have sides "
      f"divisible by 4, in ascending order, such as {kind}:4x4x8."
    )


def chips_per_host(topology: Topology) -> int:
  """Returns the chips of each virtual machine of a TPU slice.

  Raises:
    UserError: no slice of that version has this shape.
  """
  tpu, chips = TPUS[topology.kind], math.prod(topology.shape)
  if len(topology.shape) != tpu.dimensions:
    example = "2x2x4" if tpu.dimensions == 3 else "4x4"
    raise UserError(
      f"--topology={topology}: slices of {topology.kind} have {tpu.dimensions} "
      f"dimensions, such as {topology.kind}:{example}."
    )
  if chips in tpu.small:
    return chips
  if chips % _CHIPS_PER_HOST:
    raise UserError(
      f"--topology={topology}: {chips} chips are not a whole number of machines of "
      f"{_CHIPS_PER_HOST}."
    )
  return _CHIPS_PER_HOST


def accelerator_type(topology: Topology) -> str:
  """Returns the accelerator type of TPU VMs, such as v5p-32.

  Raises:
    UserError: TPU VMs of this version are not offered.
  """
  tpu = TPUS[topology.kind]
  if not tpu.type_name:
    offered = ", ".join(name for name, other in TPUS.items() if other.type_name)
    raise UserError(
      f"--topology={topology}: TPU VMs are offered with {offered}. Use --target=gke-tpu."
    )
  chips = math.prod(topology.shape)
  return f"{tpu.type_name}-{chips * 2 if tpu.counts_cores else chips}"
