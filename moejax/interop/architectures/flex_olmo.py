"""FlexOlmo (arXiv:2507.07024): OLMoE with the norms on the output of each branch."""

from typing import Any

from moejax.config import Config
from moejax.interop import fields
from moejax.interop.architecture import Architecture
from moejax.interop.keys import Keys
from moejax.interop.table import (
  ATTENTION,
  ATTENTION_BIASES,
  EXPERTS,
  FLAT,
  OUT_BIAS,
  QK_NORMS,
  ROUTER,
  entry,
)

_CLASS = "FlexOlmoForCausalLM"

LAYER = (
  entry("attention_post_norm.scale", "post_attention_layernorm.weight", FLAT),
  entry("feed_forward_post_norm.scale", "post_feedforward_layernorm.weight", FLAT),
  *ATTENTION,
  *ATTENTION_BIASES,
  *OUT_BIAS,
  *QK_NORMS,
  *ROUTER,
  *EXPERTS,
)


def read(keys: Keys) -> Config:
  config = fields.read_decoder(keys, theta=500_000.0)
  model, moe = config.model, config.moe
  model.qk_norm, model.qk_norm_scope = True, "width"
  model.norm_placement = "post"
  fields.read_attention_bias(keys, config)
  moe.num_experts = fields.take_experts(keys, "num_experts", "num_local_experts")
  moe.num_selected = keys.take("num_experts_per_tok", int, 5)
  moe.hidden = keys.take("intermediate_size", int)
  fields.renormalize(keys, config, False)
  return config


def write(config: Config) -> dict[str, Any]:
  model, moe = config.model, config.moe
  return fields.write_decoder(config, class_name=_CLASS) | {
    "attention_bias": model.attention_bias,
    "intermediate_size": moe.hidden,
    "norm_topk_prob": moe.renormalize != "none",
    "num_experts": moe.num_experts,
    "num_experts_per_tok": moe.num_selected,
  }


ARCHITECTURE = Architecture(
  name="flex_olmo", class_name=_CLASS, layer=LAYER, read=read, write=write
)
