"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): a gated shared expert, query biases."""

from typing import Any

from moejax.config import Config
from moejax.errors import UserError
from moejax.interop import fields
from moejax.interop.architecture import Architecture
from moejax.interop.keys import Keys
from moejax.interop.table import (
  ATTENTION,
  ATTENTION_BIASES,
  DENSE,
  EXPERTS,
  LINEAR,
  PRE_NORMS,
  ROUTER,
  entry,
  feed_forward,
)

_CLASS = "Qwen2MoeForCausalLM"

LAYER = (
  *PRE_NORMS,
  *ATTENTION,
  *ATTENTION_BIASES,
  *DENSE,
  *ROUTER,
  *EXPERTS,
  *feed_forward("moe.shared", "mlp.shared_expert"),
  entry("moe.shared_gate", "mlp.shared_expert_gate.weight", LINEAR),
)


def read(keys: Keys) -> Config:
  config = fields.read_decoder(keys, kv_heads=16, positions=32_768)
  model, moe = config.model, config.moe
  model.attention_bias = keys.take("qkv_bias", bool, True)
  _read_windows(keys, config)
  model.hidden = keys.take("intermediate_size", int)
  moe.num_experts = fields.take_experts(keys, "num_experts", "num_local_experts")
  moe.num_selected = keys.take("num_experts_per_tok", int, 4)
  moe.hidden = keys.take("moe_intermediate_size", int)
  moe.shared_hidden = keys.take("shared_expert_intermediate_size", int)
  moe.shared_gate = True
  fields.read_sparse_step(keys, config)
  fields.renormalize(keys, config, False)
  return config


def _read_windows(keys: Keys, config: Config) -> None:
  """Reads the keys of windows; by default every other of the first layers has one."""
  model = config.model
  slides = keys.take("use_sliding_window", bool, False)
  most = keys.take("max_window_layers", int, 28)
  keys.skip("sliding_window")  # Read, and checked, only if windows are used.
  model.sliding_window = fields.take_window(keys, 4096) if slides else 0
  kinds = ("sliding_attention", "full_attention")
  fields.read_windows(
    keys,
    config,
    [kinds[bool(i % 2 or i >= most or not slides)] for i in range(model.num_layers)],
  )


def write(config: Config) -> dict[str, Any]:
  model, moe = config.model, config.moe
  if not moe.shared_hidden:
    raise UserError(
      "the model has no shared expert (--config.moe.shared_hidden=0), but qwen2_moe has "
      "one in each MoE layer"
    )
  return (
    fields.write_decoder(config, class_name=_CLASS)
    | fields.write_sparse_step(config)
    | {
      "intermediate_size": model.hidden,
      "layer_types": fields.write_windows(config),
      "max_window_layers": model.num_layers,
      "moe_intermediate_size": moe.hidden,
      "norm_topk_prob": moe.renormalize != "none",
      "num_experts": moe.num_experts,
      "num_experts_per_tok": moe.num_selected,
      "qkv_bias": model.attention_bias,
      "shared_expert_intermediate_size": moe.shared_hidden,
      "sliding_window": model.sliding_window or None,
      "use_sliding_window": bool(model.sliding_window),
    }
  )


ARCHITECTURE = Architecture(
  name="qwen2_moe", class_name=_CLASS, layer=LAYER, read=read, write=write
)
