"""Mixtral 8x22B: 140,620,634,112 parameters, 39,152,031,744 active.

56 layers of D 6144 with 48 query and 8 key/value heads, eight SwiGLU experts of F 16,384,
two for each token, with renormalised gates (config.json of mistralai/Mixtral-8x22B-v0.1).

Command:  python -m tools.count --config=configs/mixtral_8x22b.py
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
      vocab_size=32_000,
      sequence_length=4096,
    ),
    model=ModelConfig(
      num_layers=56,
      width=6144,
      num_heads=48,
      num_kv_heads=8,
      activation="swiglu",
      vocab_size=32_000,
      tie_embeddings=False,
      rope_theta=1e6,
      norm_eps=1e-5,
      max_position=65_536,
      dtype="bfloat16",
      remat="all",
    ),
    moe=MoEConfig(
      num_experts=8,
      num_selected=2,
      hidden=16_384,
      router="top_k",
      renormalize="before_drop",
      every=1,
      offset=0,
      capacity_factor=None,
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
  config.train.num_steps = 100_000
  config.train.batch_size = 1024
  return config
