"""OLMoE (arXiv:2409.02060): QK-norm over the full width, clipping, plain gates."""

from typing import Any

from moejax.config import Config
from moejax.interop import fields
from moejax.interop.architecture import Architecture
from moejax.interop.keys import Keys
from moejax.interop.table import (
  ATTENTION,
  ATTENTION_BIASES,
  EXPERTS,
  OUT_BIAS,
  PRE_NORMS,
  QK_NORMS,
  ROUTER,
)

_CLASS = "OlmoeForCausalLM"

LAYER = (
  *PRE_NORMS,
  *ATTENTION,
  *ATTENTION_BIASES,
  *OUT_BIAS,
  *QK_NORMS,
  *ROUTER,
  *EXPERTS,
)


def read(keys: Keys) -> Config:
  config = fields.read_decoder(keys, eps=1e-5)
  model, moe = config.model, config.moe
  model.qk_norm, model.qk_norm_scope = True, "width"
  model.clip_qkv = keys.take("clip_qkv", float, None)
  fields.read_attention_bias(keys, config)
  moe.num_experts = fields.take_experts(keys, "num_experts", "num_local_experts")
  moe.num_selected = keys.take("num_experts_per_tok", int, 8)
  moe.hidden = keys.take("intermediate_size", int)
  fields.renormalize(keys, config, False)
  return config


def write(config: Config) -> dict[str, Any]:
  model, moe = config.model, config.moe
  return fields.write_decoder(config, class_name=_CLASS) | {
    "attention_bias": model.attention_bias,
    "clip_qkv": model.clip_qkv,
    "intermediate_size": moe.hidden,
    "norm_topk_prob": moe.renormalize != "none",
    "num_experts": moe.num_experts,
    "num_experts_per_tok": moe.num_selected,
  }


ARCHITECTURE = Architecture(
  name="olmoe", class_name=_CLASS, layer=LAYER, read=read, write=write
)
