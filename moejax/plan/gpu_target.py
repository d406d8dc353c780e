"""Describes an absent GPU to XLA, as a GpuTargetConfig in text form.

Fields and figures are from XLA's descriptions of the same GPUs, reduced to what the
compiler reads: sizes and limits. The two kinds differ only in memory.
"""

from moejax.cost.chips import CHIPS

_TEXT = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""


def target_config(kind: str) -> str:
  """Returns the description of an `h100` or `h200`."""
  chip = CHIPS[kind]
  return _TEXT.format(
    memory=chip.hbm_bytes, bandwidth=round(chip.hbm_bandwidth), name=chip.kinds[0]
  )
