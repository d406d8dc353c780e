"""Granite-3.0-3B-A800M (IBM, 2024): 3,298,793,472 parameters, 882,874,368 active.

32 layers of D 1536 with 24 query and 8 key/value heads, 40 experts of F 512, eight for
each token, with renormalised gates; four multipliers on embeddings, attention, residuals
and logits; tied embeddings (config.json of ibm-granite/granite-3.0-3b-a800m-base).

Command:  python -m tools.count --config=configs/granite_moe_3b.py
Hardware: never run; counted, and a copy with small sizes trained for a step in the tests
Result:   docs/presets.md
"""

from moejax.config import (
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
)


def get_config() -> Config:
  config = Config(
    data=DataConfig(
      name="c4",
      tokenizer="bpe",
      vocab_size=49_155,
      sequence_length=4096,
    ),
    model=ModelConfig(
      num_layers=32,
      width=1536,
      num_heads=24,
      num_kv_heads=8,
      activation="swiglu",
      vocab_size=49_155,
      tie_embeddings=True,
      embedding_scale=12.0,
      residual_scale=0.22,
      attention_scale=0.015625,
      logits_divisor=6.0,
      dtype="bfloat16",
      remat="all",
    ),
    moe=MoEConfig(
      num_experts=40,
      num_selected=8,
      hidden=512,
      router="top_k",
      renormalize="before_drop",
      every=1,
      offset=0,
      capacity_factor=None,
      balance_weight=0.001,
    ),
    optimizer=OptimizerConfig(
      learning_rate=3e-4,
      warmup_steps=2000,
    ),
    mesh=MeshConfig(
      data=1,
      fsdp=-1,
      expert=8,
      tensor=1,
    ),
  )
  config.train.num_steps = 500_000
  config.train.batch_size = 1024
  return config
