"""Qwen3-30B-A3B (arXiv:2505.09388): 30,532,122,624 parameters, 3,353,032,704 active.

48 layers of D 2048 with 32 query and 4 key/value heads of 128, RMSNorm on each head's
queries and keys; 128 experts of F 768, eight for each token, with renormalised gates
(config.json of Qwen/Qwen3-30B-A3B). The balance loss sees the whole batch, as the report
says.

Command:  python -m tools.count --config=configs/qwen3_30b_a3b.py
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
      vocab_size=151_936,
      sequence_length=4096,
    ),
    model=ModelConfig(
      num_layers=48,
      width=2048,
      num_heads=32,
      num_kv_heads=4,
      head_dim=128,
      activation="swiglu",
      vocab_size=151_936,
      tie_embeddings=False,
      qk_norm=True,
      rope_theta=1e6,
      max_position=40_960,
      dtype="bfloat16",
      remat="all",
    ),
    moe=MoEConfig(
      num_experts=128,
      num_selected=8,
      hidden=768,
      router="top_k",
      renormalize="before_drop",
      every=1,
      offset=0,
      capacity_factor=None,
      balance_weight=0.001,
      balance_scope="batch",
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
