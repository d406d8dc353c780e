"""Random configs of each architecture: sizes that coincide, and every option.

Read by both sides of the comparison with Transformers, so it needs neither. Sizes are
often equal on purpose (F = D, 2F = D, one head), where a guess by shape would pass.
"""

import random
from typing import Any

SEEDS = range(4)
"""Of the configs of an architecture."""

V, LENGTH, CONTEXT = 101, 24, 64
"""Vocabulary, tokens of a row, max_position_embeddings."""

Values = dict[str, Any]


def _common(draw: random.Random) -> Values:
  width = draw.choice([16, 24, 32])
  pairs = [(4, 4), (4, 2), (4, 1), (2, 1), (8, 2)]
  # Rotary positions turn pairs of a head's entries.
  heads, kv_heads = draw.choice([p for p in pairs if width // p[0] % 2 == 0])
  return {
    "vocab_size": V,
    "hidden_size": width,
    "num_hidden_layers": draw.randint(2, 5),
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": draw.random() < 0.5,
    "rms_norm_eps": draw.choice([1e-5, 1e-6, 1e-3]),
    "hidden_act": draw.choice(["silu", "silu", "gelu_pytorch_tanh"]),
    "rope_parameters": _rope(draw),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
  }


def _rope(draw: random.Random) -> Values:
  kind = draw.choice(["default", "linear", "llama3", "yarn", "yarn"])
  rope: Values = {"rope_type": kind, "rope_theta": draw.choice([1e3, 1e4, 1e6])}
  if kind != "default":
    rope["factor"] = draw.choice([0.5, 2.0, 4.0, 40.0])
  if kind in ("llama3", "yarn"):
    rope["original_max_position_embeddings"] = draw.choice([8, 16, 32])
  if kind == "llama3":
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": draw.choice([2.0, 4.0])}
  if kind == "yarn":
    extras = {
      "attention_factor": draw.choice([0.8, 1.3]),
      "beta_fast": draw.choice([4.0, 32.0]),
      "truncate": draw.random() < 0.5,
      "mscale": draw.choice([0.7, 1.0]),
      "mscale_all_dim": draw.choice([0.5, 1.0]),
    }
    rope |= {key: value for key, value in extras.items() if draw.random() < 0.4}
  return rope


def _experts(draw: random.Random, width: int, key: str = "num_experts") -> Values:
  experts = draw.randint(3, 9)
  return {
    key: experts,
    "num_experts_per_tok": draw.randint(1, min(4, experts)),
    "intermediate_size": draw.choice([width, width // 2, 2 * width, 14]),
  }


def _dense_and_sparse(draw: random.Random, values: Values) -> Values:
  width = values["hidden_size"]
  step = draw.choice([1, 1, 2])
  sparse = [i for i in range(values["num_hidden_layers"]) if (i + 1) % step == 0]
  return _experts(draw, width) | {
    "moe_intermediate_size": draw.choice([width, width // 2, 14]),
    "decoder_sparse_step": step,
    "mlp_only_layers": draw.sample(sparse, draw.randint(0, len(sparse) - 1)),
    "norm_topk_prob": draw.random() < 0.5,
    "use_sliding_window": draw.random() < 0.5,
    "sliding_window": draw.randint(1, LENGTH),
  }


def _grouped(draw: random.Random, width: int) -> Values:
  groups = draw.choice([1, 1, 2, 4])
  experts = groups * draw.randint(2, 4)
  selected = draw.randint(1, groups)
  most = min(4, selected * experts // groups)
  return {
    "n_routed_experts": experts,
    "num_experts_per_tok": draw.randint(1, most),
    "n_group": groups,
    "topk_group": selected,
    "n_shared_experts": draw.randint(0, 2),
    "routed_scaling_factor": draw.choice([1.0, 2.5]),
    "moe_intermediate_size": draw.choice([width, width // 2, 14]),
    "intermediate_size": draw.choice([width, 2 * width, 52]),
    "attention_bias": draw.random() < 0.5,
  }


def _latent(draw: random.Random, values: Values) -> Values:
  own = _grouped(draw, values["hidden_size"]) | {
    "num_key_value_heads": values["num_attention_heads"],
    "q_lora_rank": draw.choice([None, 16, 20]),
    "kv_lora_rank": draw.choice([16, 12]),
    "qk_nope_head_dim": draw.choice([6, 10]),
    "qk_rope_head_dim": draw.choice([6, 10]),
    "v_head_dim": draw.choice([6, 12]),
    "first_k_dense_replace": draw.randint(0, values["num_hidden_layers"] - 1),
  }
  return own


def _mixtral(draw: random.Random, values: Values) -> Values:
  return _experts(draw, values["hidden_size"], "num_local_experts") | {
    "head_dim": draw.choice([6, 10]),
    "sliding_window": draw.choice([None, 1, 7]),
  }


def _olmoe(draw: random.Random, values: Values) -> Values:
  return _experts(draw, values["hidden_size"]) | {
    "norm_topk_prob": draw.random() < 0.5,
    "attention_bias": draw.random() < 0.5,
    "clip_qkv": draw.choice([None, 0.5]),
  }


def _flex_olmo(draw: random.Random, values: Values) -> Values:
  own = _olmoe(draw, values)
  del own["clip_qkv"]
  return own


def _qwen2_moe(draw: random.Random, values: Values) -> Values:
  return _dense_and_sparse(draw, values) | {
    "shared_expert_intermediate_size": draw.choice([values["hidden_size"], 34]),
    "qkv_bias": draw.random() < 0.5,
    "max_window_layers": draw.randint(0, values["num_hidden_layers"]),
  }


def _qwen3_moe(draw: random.Random, values: Values) -> Values:
  return _dense_and_sparse(draw, values) | {
    "head_dim": draw.choice([6, 10]),
    "attention_bias": draw.random() < 0.5,
  }


def _deepseek_v2(draw: random.Random, values: Values) -> Values:
  own = _latent(draw, values)
  limited = own["n_group"] > 1
  return own | {"topk_method": "group_limited_greedy" if limited else "greedy"}


def _deepseek_v3(draw: random.Random, values: Values) -> Values:
  return _latent(draw, values) | {
    "norm_topk_prob": draw.random() < 0.5,
    "rope_interleave": draw.random() < 0.5,
  }


def _glm4_moe(draw: random.Random, values: Values) -> Values:
  return _grouped(draw, values["hidden_size"]) | {
    "head_dim": draw.choice([8, 12]),
    "use_qk_norm": draw.random() < 0.5,
    "norm_topk_prob": draw.random() < 0.5,
    "first_k_dense_replace": draw.randint(0, values["num_hidden_layers"] - 1),
    "rope_parameters": values["rope_parameters"]
    | {"partial_rotary_factor": draw.choice([0.5, 1.0])},
  }


def _gpt_oss(draw: random.Random, values: Values) -> Values:
  kinds = ["full_attention", "sliding_attention"]
  return _experts(draw, values["hidden_size"], "num_local_experts") | {
    "hidden_act": "silu",
    "head_dim": draw.choice([6, 10]),
    "attention_bias": draw.random() < 0.5,
    "sliding_window": draw.randint(1, LENGTH),
    "layer_types": [draw.choice(kinds) for _ in range(values["num_hidden_layers"])],
  }


def _granitemoe(draw: random.Random, values: Values) -> Values:
  return _experts(draw, values["hidden_size"], "num_local_experts") | {
    "attention_bias": draw.random() < 0.5,
    "attention_multiplier": draw.choice([0.2, 0.5]),
    "embedding_multiplier": draw.choice([1.0, 3.0]),
    "logits_scaling": draw.choice([1.0, 3.0]),
    "residual_multiplier": draw.choice([1.0, 0.5]),
  }


def _granitemoeshared(draw: random.Random, values: Values) -> Values:
  shared = draw.choice([0, values["hidden_size"], 18])
  return _granitemoe(draw, values) | {"shared_intermediate_size": shared}


def _switch(draw: random.Random, values: Values) -> Values:
  """Keys of its own: nothing is shared with decoders but tokens and tying."""
  kept = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id")
  sparse = {stack: draw.randint(1, 3) for stack in ("encoder", "decoder")}
  every = {stack: draw.randint(1, 2) for stack in sparse}
  width = values["hidden_size"]
  return {key: values[key] for key in kept} | {
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "d_model": width,
    "d_ff": draw.choice([width, width // 2, 34]),
    "d_kv": draw.choice([6, 10]),
    "num_heads": draw.choice([1, 2, 4]),
    "num_layers": sparse["encoder"] * every["encoder"],
    "num_decoder_layers": sparse["decoder"] * every["decoder"],
    "num_sparse_encoder_layers": sparse["encoder"],
    "num_sparse_decoder_layers": sparse["decoder"],
    "num_experts": draw.randint(2, 7),
    "expert_capacity": draw.choice([1, 3, 5, 64]),
    "router_bias": draw.random() < 0.5,
    "relative_attention_num_buckets": draw.choice([8, 16]),
    "relative_attention_max_distance": draw.choice([9, 20]),
    "layer_norm_epsilon": draw.choice([1e-6, 1e-3]),
  }


_OWN = {
  "mixtral": _mixtral,
  "olmoe": _olmoe,
  "flex_olmo": _flex_olmo,
  "qwen2_moe": _qwen2_moe,
  "qwen3_moe": _qwen3_moe,
  "deepseek_v2": _deepseek_v2,
  "deepseek_v3": _deepseek_v3,
  "glm4_moe": _glm4_moe,
  "gpt_oss": _gpt_oss,
  "granitemoe": _granitemoe,
  "granitemoeshared": _granitemoeshared,
  "switch_transformers": _switch,
}
ARCHITECTURES = tuple(_OWN)


def variants(kind: str, seeds: Any = SEEDS) -> dict[str, tuple[str, Values]]:
  """Returns the configs of an architecture, by name."""
  found = {}
  for seed in seeds:
    draw = random.Random(f"{kind}-{seed}")
    values = _common(draw)
    own = _OWN[kind](draw, values)
    found[f"{kind}_{seed}"] = (kind, own if kind.startswith("switch") else values | own)
  return found
