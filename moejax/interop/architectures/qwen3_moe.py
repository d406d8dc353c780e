"""Qwen3-MoE (arXiv:2505.09388): QK-norm per head, no shared expert."""

from typing import Any

from moejax.config import Config
from moejax.interop import fields
from moejax.interop.architecture import Architecture
from moejax.interop.keys import Keys
from moejax.interop.table import (
  ATTENTION,
  ATTENTION_BIASES,
  DENSE,
  EXPERTS,
  OUT_BIAS,
  PRE_NORMS,
  QK_NORMS,
  ROUTER,
)

_CLASS = "Qwen3MoeForCausalLM"

LAYER = (
  *PRE_NORMS,
  *ATTENTION,
  *ATTENTION_BIASES,
  *OUT_BIAS,
  *QK_NORMS,
  *DENSE,
  *ROUTER,
  *EXPERTS,
)


def read(keys: Keys) -> Config:
  config = fields.read_decoder(keys, kv_heads=4, positions=32_768)
  model, moe = config.model, config.moe
  model.qk_norm = True
  # These occur in published files, with values that change nothing.
  keys.only("use_qk_norm", True)
  keys.only("qkv_bias", False)
  keys.only("shared_expert_intermediate_size", 0, None)
  fields.read_attention_bias(keys, config)
  slides = keys.take("use_sliding_window", bool, False)
  keys.skip("sliding_window")  # Read, and checked, only if windows are used.
  model.sliding_window = fields.take_window(keys, 4096) if slides else 0
  keys.skip("max_window_layers")  # Not read by this class.
  model.hidden = keys.take("intermediate_size", int)
  moe.num_experts = fields.take_experts(keys, "num_experts", "num_local_experts")
  moe.num_selected = keys.take("num_experts_per_tok", int, 8)
  moe.hidden = keys.take("moe_intermediate_size", int)
  fields.read_sparse_step(keys, config)
  fields.renormalize(keys, config, False)
  return config


def write(config: Config) -> dict[str, Any]:
  model, moe = config.model, config.moe
  return (
    fields.write_decoder(config, class_name=_CLASS)
    | fields.write_sparse_step(config)
    | {
      "attention_bias": model.attention_bias,
      "intermediate_size": model.hidden,
      "moe_intermediate_size": moe.hidden,
      "norm_topk_prob": moe.renormalize != "none",
      "num_experts": moe.num_experts,
      "num_experts_per_tok": moe.num_selected,
      "sliding_window": model.sliding_window or None,
      "use_sliding_window": bool(model.sliding_window),
    }
  )


ARCHITECTURE = Architecture(
  name="qwen3_moe", class_name=_CLASS, layer=LAYER, read=read, write=write
)
