"""GLM-4.5 (arXiv:2508.06471): the router of DeepSeek-V3, grouped queries."""

from typing import Any

from moejax.config import Config
from moejax.interop import fields
from moejax.interop.architecture import Architecture
from moejax.interop.architectures import deepseek_v3
from moejax.interop.keys import Keys
from moejax.interop.table import (
  ATTENTION,
  ATTENTION_BIASES,
  PRE_NORMS,
  QK_NORMS,
)

_CLASS = "Glm4MoeForCausalLM"

LAYER = (
  *PRE_NORMS,
  *ATTENTION,
  *ATTENTION_BIASES,
  *QK_NORMS,
  *deepseek_v3.FEED_FORWARD,
)


def read(keys: Keys) -> Config:
  config = fields.read_decoder(
    keys, eps=1e-5, fraction=0.5, kv_heads=8, positions=131_072
  )
  config.model.attention_bias = keys.take("attention_bias", bool, False)
  config.model.qk_norm = keys.take("use_qk_norm", bool, False)
  keys.only("mlp_bias", False)
  deepseek_v3.read_experts(keys, config, dense=1, scale=1.0, groups=1, selected=1)
  return config


def write(config: Config) -> dict[str, Any]:
  model = config.model
  return (
    fields.write_decoder(config, class_name=_CLASS)
    | deepseek_v3.write_experts(config)
    | {
      "attention_bias": model.attention_bias,
      # Also outside rope_parameters: absent, it is 0.5 there.
      "partial_rotary_factor": model.rope_fraction,
      "use_qk_norm": model.qk_norm,
    }
  )


ARCHITECTURE = Architecture(
  name="glm4_moe",
  class_name=_CLASS,
  layer=LAYER,
  read=read,
  write=write,
  left_out=fields.further_layers,
)
