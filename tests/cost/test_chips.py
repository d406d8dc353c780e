"""The table of chips, held to what its makers print; each line says how it was read."""

import pytest

from moejax.cost import chips
from moejax.plan import topology

# kind: TFLOP/s of bfloat16, GB (GiB on TPUs), GB/s, each of one device of jax.
PRINTED = {
  # Google prints a chip; it is two devices on v2, v3 and 7x, one on the others.
  "TPU v2": (45 / 2, 16 / 2, 700 / 2),
  "TPU v3": (123 / 2, 32 / 2, 900 / 2),
  "TPU v4": (275, 32, 1200),
  "TPU v5 lite": (197, 16, 819),
  "TPU v5e": (197, 16, 819),
  "TPU v5": (459, 95, 2765),
  "TPU v5p": (459, 95, 2765),
  "TPU v6 lite": (918, 32, 1640),
  "TPU v6e": (918, 32, 1640),
  "TPU7x": (2307 / 2, 192 / 2, 7380 / 2),
  # Volta and Turing compute in float16, and not in bfloat16.
  "Tesla V100-SXM2-16GB": (None, 16, 900),
  "Tesla V100-SXM2-32GB": (None, 32, 900),
  "Tesla T4": (None, 16, 320),
  # From here on NVIDIA prints sparse products, twice the dense ones, or both.
  "NVIDIA A100-SXM4-40GB": (624 / 2, 40, 1555),
  "NVIDIA A100-PCIE-40GB": (624 / 2, 40, 1555),
  "NVIDIA A100-SXM4-80GB": (624 / 2, 80, 2039),
  "NVIDIA A100 80GB PCIe": (624 / 2, 80, 1935),
  "NVIDIA A10": (250 / 2, 24, 600),
  "NVIDIA A30": (330 / 2, 24, 933),
  "NVIDIA A40": (299.4 / 2, 48, 696),
  "NVIDIA H100 80GB HBM3": (1979 / 2, 80, 3350),
  "NVIDIA H100 PCIe": (1513 / 2, 80, 2000),
  "NVIDIA H100 NVL": (1671 / 2, 94, 3900),
  "NVIDIA H200": (1979 / 2, 141, 4800),
  "NVIDIA H200 NVL": (1671 / 2, 141, 4800),
  "NVIDIA GH200 480GB": (1979 / 2, 96, 4000),
  "NVIDIA B200": (4500 / 2, 180, 7700),
  "NVIDIA GB200": (5000 / 2, 186, 8000),
  "NVIDIA L4": (242 / 2, 24, 300),
  "NVIDIA L40": (362 / 2, 48, 864),
  # The data sheet prints 362.05 dense and 733 sparse.
  "NVIDIA L40S": (362.05, 48, 864),
  "NVIDIA GeForce RTX 4090": (330.4 / 2, 24, 1008),
}


@pytest.mark.parametrize("kind", PRINTED)
def test_a_device_has_the_figures_that_are_printed(kind):
  """To the last printed digit, or within 3% where XLA's own description differs."""
  flops, memory, bandwidth = PRINTED[kind]
  chip = chips.per_device(kind)
  assert chip is not None
  wanted = None if flops is None else pytest.approx(flops * 1e12, rel=1e-3)
  assert chip.flops == wanted
  assert chip.hbm_bytes == pytest.approx(memory * chips.GIB, rel=0.03)
  assert chip.hbm_bandwidth == pytest.approx(bandwidth * 1e9, rel=0.03)
  assert chip.source.startswith("https://") and chip.devices == 1


def test_every_row_is_tested_and_no_kind_is_in_two():
  kinds = [kind for chip in chips.CHIPS.values() for kind in chip.kinds]
  assert sorted(kinds) == sorted(PRINTED)


@pytest.mark.parametrize(
  "kind",
  [
    "cpu",
    "",
    "TPU",
    "TPU v4 lite",
    "TPU v5x",
    "TPU7",
    "NVIDIA H100",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H200 NVL 2",
    "NVIDIA A10G",
    "NVIDIA L400",
  ],
)
def test_what_is_not_known_is_not_guessed(kind):
  """A name that only begins, or ends, like one in the table may be a slower device."""
  assert chips.per_device(kind) is None


def test_capitals_and_spaces_around_a_name_do_not_matter():
  assert chips.per_device(" tpu V5 Lite ") == chips.CHIPS["v5e"]


def test_a_plan_knows_all_it_needs_of_what_it_compiles_for():
  """Every topology's chip has links, so that no time is divided by zero."""
  for name in topology.COMPILED_FOR:
    chip = chips.CHIPS[name]
    assert chip.family == "cpu" or (chip.flops and chip.link_bandwidth), name
    assert chip.family == "cpu" or chip.slow_bandwidth, name
