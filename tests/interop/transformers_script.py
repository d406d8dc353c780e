"""Makes models with Transformers, and loads ours; run by a Python that has it.

  python -m tests.interop.transformers_script make FOLDER [ARCHITECTURE]
  python -m tests.interop.transformers_script load FOLDER

`make` saves a random model for each of VARIANTS below FOLDER, or for each random config
of an architecture, with golden.npz. `load` loads each folder below FOLDER and adds
loaded.npz with its logits for the same ids.
"""

import pathlib
import sys
from typing import Any

import numpy as np

from tests.interop import random_variants

V = 101
SIZES: dict[str, Any] = {
  "vocab_size": V,
  "hidden_size": 24,
  "num_hidden_layers": 4,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
}
EXPERTS = {
  "num_experts": 9,
  "num_experts_per_tok": 3,
  "moe_intermediate_size": 14,
  "intermediate_size": 52,
}
FEW = {"num_experts": 9, "num_experts_per_tok": 3, "intermediate_size": 14}
LOCAL = {"num_local_experts": 9, "num_experts_per_tok": 3, "intermediate_size": 14}
ROUTED = {
  "n_routed_experts": 12,
  "num_experts_per_tok": 4,
  "moe_intermediate_size": 14,
  "intermediate_size": 52,
}
LATENT = ROUTED | {
  "num_attention_heads": 3,
  "num_key_value_heads": 3,
  "kv_lora_rank": 16,
  "qk_nope_head_dim": 10,
  "qk_rope_head_dim": 6,
  "v_head_dim": 12,
}
YARN = {
  "rope_type": "yarn",
  "rope_theta": 10_000.0,
  "factor": 4.0,
  "original_max_position_embeddings": 16,
}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
  "mixtral_tied": (
    "mixtral",
    LOCAL | {"tie_word_embeddings": True, "sliding_window": 5, "head_dim": 10},
  ),
  "mixtral_llama3": ("mixtral", LOCAL | {"rope_parameters": LLAMA3}),
  "mixtral_linear": ("mixtral", LOCAL | {"rope_parameters": LINEAR}),
  "mixtral_square": ("mixtral", LOCAL | {"intermediate_size": 24}),
  "mixtral_half": ("mixtral", LOCAL | {"intermediate_size": 12}),
  "qwen2_every_other": (
    "qwen2_moe",
    EXPERTS
    | {
      "shared_expert_intermediate_size": 34,
      "decoder_sparse_step": 2,
      "norm_topk_prob": True,
      "tie_word_embeddings": True,
      "qkv_bias": False,
    },
  ),
  "qwen2_windows": (
    "qwen2_moe",
    EXPERTS
    | {
      "shared_expert_intermediate_size": 34,
      "mlp_only_layers": [0, 2],
      "use_sliding_window": True,
      "sliding_window": 5,
      "max_window_layers": 3,
    },
  ),
  "qwen3_bias": (
    "qwen3_moe",
    EXPERTS
    | {
      "head_dim": 10,
      "attention_bias": True,
      "norm_topk_prob": True,
      "mlp_only_layers": [1],
      "use_sliding_window": True,
      "sliding_window": 5,
    },
  ),
  "qwen3_yarn": (
    "qwen3_moe",
    EXPERTS
    | {
      "head_dim": 10,
      "decoder_sparse_step": 2,
      "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5},
    },
  ),
  "olmoe_clipped": (
    "olmoe",
    FEW | {"clip_qkv": 0.5, "attention_bias": True, "norm_topk_prob": True},
  ),
  "flex_tied": ("flex_olmo", FEW | {"norm_topk_prob": True, "tie_word_embeddings": True}),
  "granite_bias": (
    "granitemoe",
    LOCAL
    | {
      "attention_bias": True,
      "attention_multiplier": 0.2,
      "embedding_multiplier": 2.0,
      "logits_scaling": 3.0,
      "residual_multiplier": 0.5,
    },
  ),
  "granite_shared": ("granitemoeshared", LOCAL | {"shared_intermediate_size": 18}),
  "gpt_oss_plain": (
    "gpt_oss",
    LOCAL
    | {
      "head_dim": 10,
      "sliding_window": 4,
      "layer_types": [FULL, SLIDING, SLIDING, FULL],
      "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
      "attention_bias": False,
    },
  ),
  "gpt_oss_default": (
    "gpt_oss",
    LOCAL | {"head_dim": 10, "max_position_embeddings": 131_072},
  ),
  "glm_groups": (
    "glm4_moe",
    ROUTED
    | {
      "head_dim": 12,
      "first_k_dense_replace": 2,
      "n_shared_experts": 2,
      "n_group": 3,
      "topk_group": 2,
      "norm_topk_prob": False,
    },
  ),
  "glm_no_shared": (
    "glm4_moe",
    ROUTED
    | {
      "head_dim": 12,
      "use_qk_norm": True,
      "first_k_dense_replace": 0,
      "n_shared_experts": 0,
    },
  ),
  "deepseek_v2_groups": (
    "deepseek_v2",
    LATENT
    | {
      "q_lora_rank": 20,
      "n_group": 4,
      "topk_group": 2,
      "topk_method": "group_limited_greedy",
      "routed_scaling_factor": 2.0,
      "first_k_dense_replace": 0,
      "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5},
    },
  ),
  "deepseek_v2_bias": (
    "deepseek_v2",
    LATENT
    | {
      "q_lora_rank": 20,
      "attention_bias": True,
      "n_shared_experts": 1,
      "first_k_dense_replace": 2,
      "tie_word_embeddings": True,
      "rope_parameters": YARN | {"mscale_all_dim": 0.5},
    },
  ),
  "deepseek_v3_halves": (
    "deepseek_v3",
    LATENT
    | {
      "q_lora_rank": None,
      "n_group": 1,
      "topk_group": 1,
      "n_shared_experts": 2,
      "first_k_dense_replace": 2,
      "rope_interleave": False,
      "norm_topk_prob": False,
      "attention_bias": True,
    },
  ),
  "deepseek_v3_yarn": (
    "deepseek_v3",
    LATENT
    | {
      "q_lora_rank": 20,
      "n_group": 4,
      "topk_group": 2,
      "n_shared_experts": 0,
      "first_k_dense_replace": 0,
      "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    },
  ),
}

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def make(folder: pathlib.Path, variants: dict[str, tuple[str, dict[str, Any]]]) -> None:
  import torch  # pyright: ignore[reportMissingImports]
  from transformers import (  # pyright: ignore[reportMissingImports]
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
  )

  for name, (kind, own) in variants.items():
    config = AutoConfig.for_model(kind, **own)
    torch.manual_seed(0)
    two = config.is_encoder_decoder
    maker = AutoModelForSeq2SeqLM if two else AutoModelForCausalLM
    # Switch has no choice of how its experts run.
    options = EAGER if not two else {"attn_implementation": "eager"}
    model = maker.from_config(config, **options).float().eval()
    arrays = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
      for array_name, array in arrays:
        if "inv_freq" in array_name or array.numel() == 0:
          continue
        noise = torch.randn_like(array)
        if "norm" in array_name:
          array.copy_(1 + 0.3 * noise)
        else:
          array.copy_((0.3 if array.ndim == 1 else 0.2) * noise)
      ids = {"input_ids": torch.randint(0, V, (2, 24))}
      if two:
        ids["decoder_input_ids"] = torch.randint(0, V, (2, 11))
      logits = model(**ids).logits.numpy()
    model.save_pretrained(folder / name)
    arrays = {key: value.numpy() for key, value in ids.items()}
    np.savez(folder / name / "golden.npz", logits=logits, **arrays)


def load(folder: pathlib.Path) -> None:
  import torch  # pyright: ignore[reportMissingImports]
  from transformers import (  # pyright: ignore[reportMissingImports]
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
  )

  for path in sorted(folder.iterdir()):
    arrays = np.load(path / "golden.npz")
    names = ("input_ids", "decoder_input_ids")
    ids = {n: torch.tensor(arrays[n]).long() for n in names if n in arrays}
    if len(ids) > 1:
      maker, options = AutoModelForSeq2SeqLM, {"attn_implementation": "eager"}
    else:
      maker, options = AutoModelForCausalLM, EAGER
    model, report = maker.from_pretrained(path, output_loading_info=True, **options)
    # Of shared experts of width 0 there is nothing to write.
    empty = {name for name, array in model.named_parameters() if not array.numel()}
    problems = {
      what: names for what, found in report.items() if (names := {*found} - empty)
    }
    assert not problems, f"{path}: {problems}"
    with torch.no_grad():
      np.savez(path / "loaded.npz", logits=model.eval()(**ids).logits.float().numpy())


if __name__ == "__main__":
  folder = pathlib.Path(sys.argv[2])
  match sys.argv[1], sys.argv[3:]:
    case "make", []:
      make(folder, {name: (kind, SIZES | own) for name, (kind, own) in VARIANTS.items()})
    case "make", kinds:
      for each in kinds:
        make(folder, random_variants.variants(each))
    case _:
      load(folder)
