"""GPT-OSS (arXiv:2508.10925): biases, sinks, clamped SwiGLU, alternating windows."""

from typing import Any

from moejax.config import Config
from moejax.interop import fields
from moejax.interop.architecture import Architecture
from moejax.interop.keys import Keys
from moejax.interop.table import (
  ATTENTION,
  ATTENTION_BIASES,
  FLAT,
  LINEAR,
  OUT_BIAS,
  PRE_NORMS,
  SAME,
  Halves,
  entry,
)

_CLASS = "GptOssForCausalLM"

_GATE_UP = Halves(transposed=False, interleaved=True)

LAYER = (
  *PRE_NORMS,
  *ATTENTION,
  *ATTENTION_BIASES,
  *OUT_BIAS,
  entry("attention.sinks", "self_attn.sinks", FLAT),
  entry("moe.router.weight", "mlp.router.weight", LINEAR),
  entry("moe.router.logit_bias", "mlp.router.bias", FLAT),
  entry(
    "moe.experts.w_gate moe.experts.w_in",
    "mlp.experts.gate_up_proj",
    _GATE_UP,
    stacked=True,
  ),
  entry(
    "moe.experts.gate_bias moe.experts.in_bias",
    "mlp.experts.gate_up_proj_bias",
    _GATE_UP,
    stacked=True,
  ),
  entry("moe.experts.w_out", "mlp.experts.down_proj", SAME, stacked=True),
  entry("moe.experts.out_bias", "mlp.experts.down_proj_bias", SAME, stacked=True),
)

_YARN = {
  "rope_type": "yarn",
  "factor": 32.0,
  "beta_fast": 32.0,
  "beta_slow": 1.0,
  "truncate": False,
  "original_max_position_embeddings": 4096,
}
"""Default of rope_parameters."""


def read(keys: Keys) -> Config:
  if keys.values.get("rope_parameters") is None and not keys.values.get("rope_scaling"):
    keys = keys.with_values(rope_parameters=_YARN)
  config = fields.read_decoder(
    keys, theta=150_000.0, eps=1e-5, kv_heads=8, positions=131_072
  )
  model, moe = config.model, config.moe
  keys.only("swiglu_limit", 7.0)
  keys.only("swiglu_alpha", 1.702)
  model.activation = "clamped_swiglu"
  model.head_dim = keys.take("head_dim", int, 64)
  fields.read_attention_bias(keys, config, default=True)
  model.attention_sinks = True
  model.sliding_window = fields.take_window(keys, 128)
  kinds = ("sliding_attention", "full_attention")
  fields.read_windows(keys, config, [kinds[i % 2] for i in range(model.num_layers)])
  moe.num_experts = fields.take_experts(keys, "num_local_experts", "num_experts")
  moe.num_selected = keys.take("num_experts_per_tok", int, 4)
  # Keys that OpenAI's own code reads, but Transformers does not.
  keys.skip("experts_per_token", "initial_context_length")
  moe.hidden = keys.take("intermediate_size", int)
  moe.renormalize = "before_drop"
  moe.router_bias = moe.expert_bias = True
  return config


def write(config: Config) -> dict[str, Any]:
  model, moe = config.model, config.moe
  return fields.write_decoder(config, class_name=_CLASS) | {
    "attention_bias": model.attention_bias,
    "intermediate_size": moe.hidden,
    "layer_types": fields.write_windows(config),
    "num_experts_per_tok": moe.num_selected,
    "num_local_experts": moe.num_experts,
    # Transformers needs a number even if no layer slides according to layer_types.
    "sliding_window": model.sliding_window or 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
  }


ARCHITECTURE = Architecture(
  name="gpt_oss", class_name=_CLASS, layer=LAYER, read=read, write=write
)
