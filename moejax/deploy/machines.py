"""What Google Cloud calls the machines of a topology, and how many processes they run.

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
  """Of GKE nodes: cloud.google.com/gke-tpu-accelerator."""
  dimensions: int
  """Of a slice's shape."""
  small: tuple[int, ...] = ()
  """Chips of a slice that is one virtual machine of its own kind; all others have 4."""
  type_name: str = ""
  """Beginning of the accelerator type of TPU VMs; empty where they are not offered."""
  counts_cores: bool = False
  """The number in the accelerator type counts cores, two to a chip."""
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
"""Of GKE nodes: cloud.google.com/gke-accelerator."""

_CHIPS_PER_HOST = 4


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
