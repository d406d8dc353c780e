"""Granite 3.0 MoE (IBM): four multipliers, experts stacked on disk."""

import math
from typing import Any

from moejax.config import Config
from moejax.errors import UserError
from moejax.interop import fields
from moejax.interop.architecture import Architecture
from moejax.interop.keys import Keys
from moejax.interop.table import (
  ATTENTION,
  ATTENTION_BIASES,
  LINEAR,
  OUT_BIAS,
  PRE_NORMS,
  Halves,
  entry,
)

_CLASS = "GraniteMoeForCausalLM"

LAYER = (
  *PRE_NORMS,
  *ATTENTION,
  *ATTENTION_BIASES,
  *OUT_BIAS,
  entry("moe.router.weight", "block_sparse_moe.router.layer.weight", LINEAR),
  entry(
    "moe.experts.w_gate moe.experts.w_in",
    "block_sparse_moe.input_linear.weight",
    Halves(),
    stacked=True,
  ),
  entry(
    "moe.experts.w_out",
    "block_sparse_moe.output_linear.weight",
    LINEAR,
    stacked=True,
  ),
)


def read(keys: Keys) -> Config:
  config = fields.read_decoder(keys, positions=2048)
  model, moe = config.model, config.moe
  fields.read_attention_bias(keys, config)
  model.embedding_scale = _multiplier(keys, "embedding_multiplier")
  model.residual_scale = _multiplier(keys, "residual_multiplier")
  model.attention_scale = _multiplier(keys, "attention_multiplier")
  model.logits_divisor = _multiplier(keys, "logits_scaling")
  moe.num_experts = fields.take_experts(keys, "num_local_experts", "num_experts")
  moe.num_selected = keys.take("num_experts_per_tok", int, 2)
  moe.hidden = keys.take("intermediate_size", int)
  moe.renormalize = "before_drop"
  return config


def _multiplier(keys: Keys, name: str) -> float:
  """Reads a multiplier, which is 1 if absent."""
  value = keys.take(name, float, 1.0, null=0.0)
  if not 0 < value < math.inf:
    raise UserError(
      f"{keys.path}: {name}={keys.values[name]!r} makes no working model. Give a "
      "positive number."
    )
  return value


def write(config: Config) -> dict[str, Any]:
  return write_as(config, _CLASS)


def write_as(config: Config, class_name: str) -> dict[str, Any]:
  """Returns the keys that `read` reads, with the name of a class."""
  model, moe = config.model, config.moe
  head_dim = model.head_dim or model.width // model.num_heads
  return fields.write_decoder(config, class_name=class_name) | {
    "attention_bias": model.attention_bias,
    "attention_multiplier": model.attention_scale or head_dim**-0.5,
    "embedding_multiplier": model.embedding_scale,
    "intermediate_size": moe.hidden,
    "logits_scaling": model.logits_divisor,
    "num_experts_per_tok": moe.num_selected,
    "num_local_experts": moe.num_experts,
    "residual_multiplier": model.residual_scale,
  }


ARCHITECTURE = Architecture(
  name="granitemoe", class_name=_CLASS, layer=LAYER, read=read, write=write
)
