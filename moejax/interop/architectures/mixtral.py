"""Mixtral (arXiv:2401.04088): softmax over the K chosen experts, windows, no biases."""

from typing import Any

from moejax.config import Config
from moejax.interop import fields
from moejax.interop.architecture import Architecture
from moejax.interop.keys import Keys
from moejax.interop.table import ATTENTION, LINEAR, PRE_NORMS, entry

_CLASS = "MixtralForCausalLM"

_EXPERTS = "block_sparse_moe.experts.{expert}"

LAYER = (
  *PRE_NORMS,
  *ATTENTION,
  entry("moe.router.weight", "block_sparse_moe.gate.weight", LINEAR),
  entry("moe.experts.w_gate", f"{_EXPERTS}.w1.weight", LINEAR),
  entry("moe.experts.w_out", f"{_EXPERTS}.w2.weight", LINEAR),
  entry("moe.experts.w_in", f"{_EXPERTS}.w3.weight", LINEAR),
)


def read(keys: Keys) -> Config:
  config = fields.read_decoder(keys, theta=1e6, eps=1e-5, kv_heads=8, positions=131_072)
  config.model.sliding_window = fields.take_window(keys, 0)
  config.moe.num_experts = fields.take_experts(keys, "num_local_experts", "num_experts")
  config.moe.num_selected = keys.take("num_experts_per_tok", int, 2)
  config.moe.hidden = keys.take("intermediate_size", int)
  config.moe.renormalize = "before_drop"
  keys.only("attention_bias", False)
  return config


def write(config: Config) -> dict[str, Any]:
  moe = config.moe
  return fields.write_decoder(config, class_name=_CLASS) | {
    "intermediate_size": moe.hidden,
    "num_experts_per_tok": moe.num_selected,
    "num_local_experts": moe.num_experts,
    "sliding_window": config.model.sliding_window or None,
  }


ARCHITECTURE = Architecture(
  name="mixtral", class_name=_CLASS, layer=LAYER, read=read, write=write
)
