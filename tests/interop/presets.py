"""Totals of the models behind configs/, with their sources.

Sums are written out from published sizes, tensor by tensor, and not through the library:
`count(e)` is the total with e routed experts in each MoE layer, so that `count(E)` is all
parameters and `count(K)` those that a token uses, the router in full.
"""

import dataclasses
from collections.abc import Callable


def attention(width: int, queries: int, keys: int) -> int:
  """Query, key, value and output projections; widths of all heads together."""
  return width * queries + 2 * width * keys + queries * width


def swiglu(width: int, hidden: int) -> int:
  return 3 * width * hidden


def latent(width: int, heads: int, q_rank: int) -> int:
  """DeepSeek's attention with ranks and heads as in all its models, norms included."""
  query = heads * (128 + 64)
  if q_rank:
    query = width * q_rank + q_rank + q_rank * query
  else:
    query = width * query
  down = width * (512 + 64) + 512
  return query + down + 512 * heads * (128 + 128) + heads * 128 * width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
  """One preset's counts."""

  source: str
  experts: int
  selected: int
  count: Callable[[int], int]
  total: int
  """As published, or as the released tensors sum up to."""
  active: int | None = None
  """As published where exact; the embedding in full, as in ours."""
  billions: tuple[float, str] | None = None
  """The active count that the maker gives, and its convention: "all" counts everything
  in full but experts, "no embedding" leaves that out, "no vocabulary" the head too."""


def _mixtral(layers: int, width: int, hidden: int) -> Callable[[int], int]:
  def count(e: int) -> int:
    layer = attention(width, width, 1024) + e * swiglu(width, hidden) + width * 8
    return layers * (layer + 2 * width) + 2 * 32_000 * width + width

  return count


def _olmoe(e: int) -> int:
  norms = 2 * 2048 + 2 * 2048  # Of the layer; of all queries and of all keys.
  layer = attention(2048, 2048, 2048) + e * swiglu(2048, 1024) + 2048 * 64 + norms
  return 16 * layer + 2 * 50_304 * 2048 + 2048


def _qwen2_moe(e: int) -> int:
  layer = attention(2048, 2048, 2048) + 3 * 2048  # Biases of q, k and v.
  layer += e * swiglu(2048, 1408) + swiglu(2048, 5632) + 2048 + 2048 * 60 + 2 * 2048
  return 24 * layer + 2 * 151_936 * 2048 + 2048


def _qwen3(layers: int, width: int, heads: int, hidden: int) -> Callable[[int], int]:
  def count(e: int) -> int:
    layer = attention(width, heads * 128, 4 * 128) + 2 * 128
    layer += e * swiglu(width, hidden) + width * 128 + 2 * width
    return layers * layer + 2 * 151_936 * width + width

  return count


def _deepseek_moe(e: int) -> int:
  every = attention(2048, 2048, 2048) + 2 * 2048
  sparse = (e + 2) * swiglu(2048, 1408) + 2048 * 64
  return 28 * every + swiglu(2048, 10_944) + 27 * sparse + 2 * 102_400 * 2048 + 2048


def _deepseek_v2_lite(e: int) -> int:
  every = latent(2048, 16, 0) + 2 * 2048
  sparse = (e + 2) * swiglu(2048, 1408) + 2048 * 64
  return 27 * every + swiglu(2048, 10_944) + 26 * sparse + 2 * 102_400 * 2048 + 2048


def _deepseek_v3(e: int) -> int:
  every = latent(7168, 128, 1536) + 2 * 7168
  sparse = (e + 1) * swiglu(7168, 2048) + 7168 * 256 + 256  # The biases of choice.
  dense = 3 * swiglu(7168, 18_432)
  return 61 * every + dense + 58 * sparse + 2 * 129_280 * 7168 + 7168


def _kimi_k2(e: int) -> int:
  every = latent(7168, 64, 1536) + 2 * 7168
  sparse = (e + 1) * swiglu(7168, 2048) + 7168 * 384 + 384
  return 61 * every + swiglu(7168, 18_432) + 60 * sparse + 2 * 163_840 * 7168 + 7168


def _glm_4_5_air(e: int) -> int:
  biases = 96 * 128 + 2 * 8 * 128
  every = attention(4096, 96 * 128, 8 * 128) + biases + 2 * 4096
  sparse = (e + 1) * swiglu(4096, 1408) + 4096 * 128 + 128
  return 46 * every + swiglu(4096, 10_944) + 45 * sparse + 2 * 151_552 * 4096 + 4096


def _gpt_oss(layers: int, experts: int) -> Callable[[int], int]:
  def count(e: int) -> int:
    d = 2880
    layer = attention(d, 64 * 64, 8 * 64) + (64 + 2 * 8) * 64 + d + 64  # Biases, sinks.
    layer += d * experts + experts + 2 * d
    layer += e * (d * 2 * d + 2 * d + d * d + d)  # gate_up and down, each with a bias.
    return layers * layer + 2 * 201_088 * d + d

  return count


def _granite(e: int) -> int:
  layer = attention(1536, 1536, 512) + e * swiglu(1536, 512) + 1536 * 40 + 2 * 1536
  return 32 * layer + 49_155 * 1536 + 1536  # Tied.


def _glam(e: int) -> int:
  every = attention(8192, 128 * 128, 128 * 128) + 2 * 8192
  sparse = e * 2 * 8192 * 32_768 + 8192 * 64  # Ungated.
  dense = 3 * 8192 * 32_768  # GEGLU.
  return 64 * every + 32 * (sparse + dense) + 256_000 * 8192 + 8192  # Tied.


def _gpt4_class(e: int) -> int:
  d = 10_752
  layer = attention(d, d, d) + e * 2 * d * 4 * d + d * 16 + 2 * d
  return 120 * layer + 2 * 100_352 * d + d


def _muomni(e: int) -> int:
  layer = attention(256, 256, 256) + e * 2 * 256 * 128 + 256 * 8 + 2 * 256
  return 4 * layer + 1024 * 256 + 256  # Tied.


def _switch_c_decoder(e: int) -> int:
  layer = attention(2048, 2048, 2048) + e * 2 * 2048 * 6240 + 2048 * 2048 + 2 * 2048
  return 30 * layer + 2 * 32_256 * 2048 + 2048


PRESETS = {
  "mixtral_8x7b": Published(
    source="tensors of mistralai/Mixtral-8x7B-v0.1; arXiv:2401.04088: 13B active",
    experts=8,
    selected=2,
    count=_mixtral(32, 4096, 14_336),
    total=46_702_792_704,
    active=12_879_925_248,
    billions=(12.9, "all"),
  ),
  "mixtral_8x22b": Published(
    source="tensors of mistralai/Mixtral-8x22B-v0.1; its announcement: 141B, 39B active",
    experts=8,
    selected=2,
    count=_mixtral(56, 6144, 16_384),
    total=140_620_634_112,
    billions=(39, "all"),
  ),
  "olmoe_1b_7b": Published(
    source="arXiv:2409.02060, table 10, and tensors of allenai/OLMoE-1B-7B-0924",
    experts=64,
    selected=8,
    count=_olmoe,
    total=6_919_161_856,
    active=1_282_017_280,
    billions=(1.3, "all"),
  ),
  "qwen2_moe_a2_7b": Published(
    source="tensors of Qwen/Qwen1.5-MoE-A2.7B; its announcement: 14.3B, 2.7B active",
    experts=60,
    selected=4,
    count=_qwen2_moe,
    total=14_315_784_192,
    billions=(2.7, "all"),
  ),
  "qwen3_30b_a3b": Published(
    source="tensors of Qwen/Qwen3-30B-A3B; arXiv:2505.09388: 3B active",
    experts=128,
    selected=8,
    count=_qwen3(48, 2048, 32, 768),
    total=30_532_122_624,
    active=3_353_032_704,
    billions=(3, "no embedding"),
  ),
  "qwen3_235b_a22b": Published(
    source="tensors of Qwen/Qwen3-235B-A22B; arXiv:2505.09388: 22B active",
    experts=128,
    selected=8,
    count=_qwen3(94, 4096, 64, 1536),
    total=235_093_634_560,
    billions=(22, "all"),
  ),
  "deepseek_moe_16b": Published(
    source="tensors of deepseek-ai/deepseek-moe-16b-base; arXiv:2401.06066: 2.8B active",
    experts=64,
    selected=6,
    count=_deepseek_moe,
    total=16_375_728_128,
    active=2_828_650_496,
    billions=(2.8, "all"),
  ),
  "deepseek_v2_lite": Published(
    source="tensors of deepseek-ai/DeepSeek-V2-Lite; arXiv:2405.04434, appendix B: 2.4B",
    experts=64,
    selected=6,
    count=_deepseek_v2_lite,
    total=15_706_484_224,
  ),
  "deepseek_v3": Published(
    source="tensors of deepseek-ai/DeepSeek-V3 without layer 61; arXiv:2412.19437: 37B",
    experts=256,
    selected=8,
    count=_deepseek_v3,
    total=671_026_419_200,
    billions=(37, "no embedding"),
  ),
  "kimi_k2": Published(
    source="sizes of moonshotai/Kimi-K2-Base; arXiv:2507.20534: 1.04T, 32.6B active",
    experts=384,
    selected=8,
    count=_kimi_k2,
    total=1_026_408_232_448,
  ),
  "glm_4_5_air": Published(
    source="sizes of zai-org/GLM-4.5-Air without layer 46; arXiv:2508.06471: 106B, 12B",
    experts=128,
    selected=8,
    count=_glm_4_5_air,
    total=106_852_251_264,
    billions=(12, "no vocabulary"),
  ),
  "gpt_oss_20b": Published(
    source="arXiv:2508.10925, table 1: 20.91B total, 3.61B active",
    experts=32,
    selected=4,
    count=_gpt_oss(24, 32),
    total=20_914_757_184,
    billions=(3.61, "no embedding"),
  ),
  "gpt_oss_120b": Published(
    source="arXiv:2508.10925, table 1: 116.83B total, 5.13B active",
    experts=128,
    selected=4,
    count=_gpt_oss(36, 128),
    total=116_829_156_672,
    billions=(5.13, "no embedding"),
  ),
  "granite_moe_3b": Published(
    source="sizes of ibm-granite/granite-3.0-3b-a800m-base: 3.3B total, 800M active",
    experts=40,
    selected=8,
    count=_granite,
    total=3_298_793_472,
    billions=(0.8, "no embedding"),
  ),
  "glam_64b_64e": Published(
    source="arXiv:2112.06905, table 4: 1.2T total, 96.6B active; the rest is arithmetic",
    experts=64,
    selected=2,
    count=_glam,
    total=1_161_756_155_904,
    billions=(96.6, "all"),
  ),
  "gpt4_class_1_8t": Published(
    source="rumour of July 2023: 1.8T total, 280B active; sizes chosen to meet it",
    experts=16,
    selected=2,
    count=_gpt4_class,
    total=1_833_372_387_840,
    billions=(280, "all"),
  ),
  "muomni_moe": Published(
    source="arithmetic; depth, heads and vocabulary are the default config's",
    experts=8,
    selected=2,
    count=_muomni,
    total=3_418_368,
  ),
  "switch_c_decoder": Published(
    source="arXiv:2101.03961, table 9: 1,571B; the decoder here is of that size",
    experts=2048,
    selected=1,
    count=_switch_c_decoder,
    total=1_571_108_808_704,
  ),
}
