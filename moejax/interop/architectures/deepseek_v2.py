"""DeepSeek-V2 (arXiv:2405.04434): latent attention, shared experts, groups of experts."""

from typing import Any

from moejax.config import Config
from moejax.interop import fields
from moejax.interop.architecture import Architecture
from moejax.interop.keys import Keys
from moejax.interop.table import (
  DENSE,
  EXPERTS,
  FLAT,
  LINEAR,
  OUT_BIAS,
  PRE_NORMS,
  ROUTER,
  Linear,
  entry,
  feed_forward,
)

_CLASS = "DeepseekV2ForCausalLM"

LATENT_ATTENTION = (
  entry("attention.query", "self_attn.q_proj.weight", LINEAR),
  entry("attention.query_down", "self_attn.q_a_proj.weight", LINEAR),
  entry("attention.query_down_bias", "self_attn.q_a_proj.bias", FLAT),
  entry("attention.query_norm.scale", "self_attn.q_a_layernorm.weight", FLAT),
  entry("attention.query_up", "self_attn.q_b_proj.weight", LINEAR),
  entry("attention.kv_down", "self_attn.kv_a_proj_with_mqa.weight", LINEAR),
  entry("attention.kv_down_bias", "self_attn.kv_a_proj_with_mqa.bias", FLAT),
  entry("attention.kv_norm.scale", "self_attn.kv_a_layernorm.weight", FLAT),
  entry("attention.kv_up", "self_attn.kv_b_proj.weight", LINEAR),
  entry("attention.out", "self_attn.o_proj.weight", Linear(inputs=2)),
  *OUT_BIAS,
)

FEED_FORWARD = (
  *DENSE,
  *ROUTER,
  *EXPERTS,
  *feed_forward("moe.shared", "mlp.shared_experts"),
)

LAYER = (*PRE_NORMS, *LATENT_ATTENTION, *FEED_FORWARD)


def read(keys: Keys) -> Config:
  config = fields.read_decoder(keys, positions=2048, latent=True)
  moe = config.moe
  read_latent(keys, config)
  config.model.rope_interleaved = True
  keys.skip("head_dim")  # The class sets it to qk_rope_head_dim.
  keys.only("mlp_bias", False)
  keys.only("scoring_func", "softmax")
  # Transformers never renormalises the gates of this model and ignores this key.
  keys.skip("norm_topk_prob")
  read_sizes(keys, config, shared=2)
  method = keys.only("topk_method", "greedy", "group_limited_greedy")
  if method == "greedy":
    keys.skip("n_group", "topk_group")
  else:
    moe.router = "group_limited"
    fields.read_groups(keys, config, best=1)
    if not moe.router_options.get("num_expert_groups"):
      moe.router = "top_k"
  return config


def read_latent(keys: Keys, config: Config) -> None:
  """Reads the keys of latent attention."""
  model = config.model
  model.attention = "latent"
  model.num_kv_heads = 0
  model.q_rank = keys.take("q_lora_rank", int, 0)
  model.kv_rank = keys.take("kv_lora_rank", int)
  model.nope_head_dim = keys.take("qk_nope_head_dim", int)
  model.rope_head_dim = keys.take("qk_rope_head_dim", int)
  model.value_head_dim = keys.take("v_head_dim", int)
  keys.only("qk_head_dim", model.nope_head_dim + model.rope_head_dim, None)
  fields.read_attention_bias(keys, config)


def write_latent(config: Config) -> dict[str, Any]:
  """Inverts `read_latent`."""
  model = config.model
  return {
    "attention_bias": model.attention_bias,
    "head_dim": model.rope_head_dim,
    "kv_lora_rank": model.kv_rank,
    "num_key_value_heads": model.num_heads,
    "q_lora_rank": model.q_rank or None,
    "qk_nope_head_dim": model.nope_head_dim,
    "qk_rope_head_dim": model.rope_head_dim,
    "v_head_dim": model.value_head_dim,
  }


def read_sizes(
  keys: Keys, config: Config, *, shared: int, dense: int = 0, scale: float = 1.0
) -> None:
  """Reads the number of experts, their width, and the layers that have them.

  Args:
    keys: of the config.json.
    config: to be completed.
    shared: default of n_shared_experts.
    dense: default of first_k_dense_replace.
    scale: default of routed_scaling_factor.
  """
  moe = config.moe
  config.model.hidden = keys.take("intermediate_size", int)
  moe.num_experts = fields.take_experts(
    keys, "n_routed_experts", "num_experts", "num_local_experts"
  )
  moe.num_selected = keys.take("num_experts_per_tok", int)
  moe.hidden = keys.take("moe_intermediate_size", int)
  moe.num_shared = keys.take(
    "n_shared_experts", int, 0 if keys.has("n_shared_experts") else shared
  )
  moe.gate_scale = keys.take("routed_scaling_factor", float, scale)
  moe.dense_prefix = keys.take("first_k_dense_replace", int, dense)
  keys.only("moe_layer_freq", 1)


def write_sizes(config: Config) -> dict[str, Any]:
  """Inverts `read_sizes`."""
  moe = config.moe
  return {
    "first_k_dense_replace": fields.leading_dense(config),
    "intermediate_size": config.model.hidden,
    "moe_intermediate_size": moe.hidden,
    "n_routed_experts": moe.num_experts,
    "n_shared_experts": moe.shared_width // moe.hidden,
    "num_experts_per_tok": moe.num_selected,
    "routed_scaling_factor": moe.gate_scale,
  }


def write(config: Config) -> dict[str, Any]:
  groups = fields.write_groups(config)
  limited = groups["n_group"] > 1
  return (
    fields.write_decoder(config, class_name=_CLASS)
    | write_latent(config)
    | write_sizes(config)
    | groups
    | {
      "norm_topk_prob": False,
      "topk_method": "group_limited_greedy" if limited else "greedy",
    }
  )


ARCHITECTURE = Architecture(
  name="deepseek_v2", class_name=_CLASS, layer=LAYER, read=read, write=write
)
