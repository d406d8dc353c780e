"""Table of chip specifications, for utilisation in training and for plans of a pod.

Figures are per chip, from its maker's page or data sheet, the `source` of each row.
FLOPs are for dense matrices (GPU data sheets since Ampere state twice that, for half-zero
matrices). jax counts each of the two cores of a TPU v2, v3 or 7x as a device, but the two
of a v4 or v5p as one. The figures of an unknown device are never guessed from a similar
name: an H100 NVL is not an H100 SXM.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One chip, or one of its devices if from `chip_of` or `per_device`."""

  family: str
  """tpu, gpu or cpu."""
  kinds: tuple[str, ...] = ()
  """The `device_kind` values that jax reports for it."""
  devices: int = 1
  """Number of jax devices per chip."""
  hbm_bytes: int
  flops: float | None
  """bfloat16 matmul FLOPs per second; None if the chip has none."""
  hbm_bandwidth: float
  """Bytes per second."""
  link_bandwidth: float = 0.0
  """Send bandwidth in bytes per second: on a TPU, one direction of one link (there are
  two links per torus dimension); on a GPU, within its node. 0 if not needed so far."""
  slow_bandwidth: float = 0.0
  """Send bandwidth to another slice (TPU) or node (GPU), in bytes per second."""
  source: str = ""

  def divided(self, parts: int) -> "Chip":
    """Returns the figures of one of `parts` equal parts."""
    if parts == 1:
      return self
    return dataclasses.replace(
      self,
      devices=1,
      hbm_bytes=self.hbm_bytes // parts,
      flops=None if self.flops is None else self.flops / parts,
      hbm_bandwidth=self.hbm_bandwidth / parts,
      link_bandwidth=self.link_bandwidth / parts,
      slow_bandwidth=self.slow_bandwidth / parts,
    )


_TPU_DOCS = "https://docs.cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us"
# Link bandwidths: How to Scale Your Model (Austin et al. 2025), chapters 2 and 12.


def _tpu(
  *kinds: str,
  page: str,
  flops: float,
  gib: int,
  bandwidth: float,
  link: float = 0.0,
  slow: float = 0.0,
  devices: int = 1,
) -> Chip:
  return Chip(
    family="tpu",
    kinds=kinds,
    devices=devices,
    hbm_bytes=gib * GIB,
    flops=flops,
    hbm_bandwidth=bandwidth,
    link_bandwidth=link,
    slow_bandwidth=slow,
    source=f"{_TPU_DOCS}/{page}",
  )


def _gpu(
  *kinds: str,
  page: str,
  flops: float | None,
  gib: float,
  bandwidth: float,
  link: float = 0.0,
  slow: float = 0.0,
) -> Chip:
  return Chip(
    family="gpu",
    kinds=kinds,
    hbm_bytes=round(gib * GIB),
    flops=flops,
    hbm_bandwidth=bandwidth,
    link_bandwidth=link,
    slow_bandwidth=slow,
    source=f"{_NVIDIA}/{page}",
  )


_VOLTA = "data-center/v100"
_TURING = "data-center/tesla-t4"
_A100 = "data-center/a100"
_H100 = "data-center/h100"
_H200 = "data-center/h200"
_HGX = "data-center/hgx"
_ADA = "geforce/graphics-cards/40-series/rtx-4090"

# Tests compare each row with its page's figures, so rows are one line if possible.
# fmt: off
CHIPS: dict[str, Chip] = {
  "v2": _tpu("TPU v2", page="v2", devices=2, flops=45e12, gib=16, bandwidth=700e9),
  "v3": _tpu("TPU v3", page="v3", devices=2, flops=123e12, gib=32, bandwidth=900e9),
  "v4": _tpu(
    "TPU v4", page="v4", flops=275e12, gib=32, bandwidth=1.23e12, link=45e9, slow=6.25e9,
  ),
  "v5e": _tpu(
    "TPU v5 lite", "TPU v5e",
    page="v5e", flops=197e12, gib=16, bandwidth=0.82e12, link=45e9, slow=3.125e9,
  ),
  "v5p": _tpu(
    "TPU v5", "TPU v5p",
    page="v5p", flops=459e12, gib=95, bandwidth=2.765e12, link=90e9, slow=6.25e9,
  ),
  "v6e": _tpu(
    "TPU v6 lite", "TPU v6e",
    page="v6e", flops=918e12, gib=32, bandwidth=1.64e12, link=90e9, slow=12.5e9,
  ),
  "tpu7x": _tpu(
    "TPU7x",
    page="tpu7x", devices=2,
    flops=2307e12, gib=192, bandwidth=7.37e12, link=100e9, slow=12.5e9,
  ),
  # No bfloat16 matmuls; float16 figures do not apply: this code does not compute in it.
  "v100-16gb": _gpu(
    "Tesla V100-SXM2-16GB", page=_VOLTA, flops=None, gib=16, bandwidth=900e9
  ),
  "v100-32gb": _gpu(
    "Tesla V100-SXM2-32GB", page=_VOLTA, flops=None, gib=32, bandwidth=900e9
  ),
  "t4": _gpu("Tesla T4", page=_TURING, flops=None, gib=16, bandwidth=320e9),
  "a100-40gb": _gpu(
    "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB",
    page=_A100, flops=312e12, gib=40, bandwidth=1.555e12,
  ),
  "a100-80gb": _gpu(
    "NVIDIA A100-SXM4-80GB", page=_A100, flops=312e12, gib=80, bandwidth=2.039e12
  ),
  "a100-pcie-80gb": _gpu(
    "NVIDIA A100 80GB PCIe", page=_A100, flops=312e12, gib=80, bandwidth=1.935e12
  ),
  "a10": _gpu(
    "NVIDIA A10", page="data-center/products/a10-gpu",
    flops=125e12, gib=24, bandwidth=600e9,
  ),
  "a30": _gpu(
    "NVIDIA A30", page="data-center/products/a30-gpu",
    flops=165e12, gib=24, bandwidth=933e9,
  ),
  "a40": _gpu(
    "NVIDIA A40", page="data-center/a40", flops=149.7e12, gib=48, bandwidth=696e9
  ),
  # For these two, memory is what XLA's device descriptions give programs.
  "h100": _gpu(
    "NVIDIA H100 80GB HBM3",
    page=_H100, flops=989e12, gib=84_942_979_072 / GIB, bandwidth=3.35232e12,
    link=450e9, slow=50e9,
  ),
  "h200": _gpu(
    "NVIDIA H200",
    page=_H200, flops=989e12, gib=151_397_597_184 / GIB, bandwidth=4.8e12,
    link=450e9, slow=50e9,
  ),
  "h100-pcie": _gpu(
    "NVIDIA H100 PCIe", page=_H100, flops=756e12, gib=80, bandwidth=2.0e12
  ),
  "h100-nvl": _gpu(
    "NVIDIA H100 NVL", page=_H100, flops=835.5e12, gib=94, bandwidth=3.9e12
  ),
  "h200-nvl": _gpu(
    "NVIDIA H200 NVL", page=_H200, flops=835.5e12, gib=141, bandwidth=4.8e12
  ),
  "gh200": _gpu(
    "NVIDIA GH200 480GB", page="data-center/grace-hopper-superchip",
    flops=989e12, gib=96, bandwidth=4.0e12,
  ),
  "b200": _gpu("NVIDIA B200", page=_HGX, flops=2250e12, gib=180, bandwidth=7.7e12),
  "gb200": _gpu(
    "NVIDIA GB200", page="data-center/gb200-nvl72",
    flops=2500e12, gib=186, bandwidth=8.0e12,
  ),
  "l4": _gpu("NVIDIA L4", page="data-center/l4", flops=121e12, gib=24, bandwidth=300e9),
  "l40": _gpu(
    "NVIDIA L40", page="data-center/l40", flops=181e12, gib=48, bandwidth=864e9
  ),
  "l40s": _gpu(
    "NVIDIA L40S", page="data-center/l40s", flops=362e12, gib=48, bandwidth=864e9
  ),
  # With float32 accumulation: half the figure stated for float16 accumulation.
  "rtx4090": _gpu(
    "NVIDIA GeForce RTX 4090", page=_ADA, flops=165.2e12, gib=24, bandwidth=1.008e12
  ),
  "cpu": Chip(family="cpu", hbm_bytes=0, flops=None, hbm_bandwidth=0.0),
}
# fmt: on
"""Chips by their name in `--topology` and reports."""

_BY_KIND = {kind.lower(): chip for chip in CHIPS.values() for kind in chip.kinds}


def per_device(device_kind: str) -> Chip | None:
  """Returns the figures of one jax device; None if its kind is unknown.

  Args:
    device_kind: as jax reports it; case-insensitive.
  """
  chip = _BY_KIND.get(device_kind.strip().lower())
  return None if chip is None else chip.divided(chip.devices)
