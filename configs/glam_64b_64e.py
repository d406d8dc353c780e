"""GLaM 64B/64E (arXiv:2112.06905, table 4): 1.162T parameters, 96.6B active.

64 layers of D 8192 with 128 heads of 128; every other feed-forward is an MoE layer of 64
GELU experts of F 32,768, two for each token, the others are GEGLU of the same width.
Where the paper adds relative position biases, this model rotates. The capacity factor is
not in the paper.

Command:  python -m tools.count --config=configs/glam_64b_64e.py
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
      vocab_size=256_000,
      sequence_length=1024,
    ),
    model=ModelConfig(
      num_layers=64,
      width=8192,
      num_heads=128,
      head_dim=128,
      hidden=32_768,
      activation="geglu",
      vocab_size=256_000,
      tie_embeddings=True,
      dtype="bfloat16",
      remat="full",
    ),
    moe=MoEConfig(
      num_experts=64,
      num_selected=2,
      hidden=32_768,
      activation="gelu",
      router="top2",
      renormalize="before_drop",
      every=2,
      offset=1,
      capacity_factor=1.25,
      z_weight=1e-4,
    ),
    optimizer=OptimizerConfig(
      name="adafactor",
      learning_rate=0.01,
      schedule="inverse_sqrt",
      warmup_steps=10_000,
    ),
    mesh=MeshConfig(
      data=1,
      fsdp=-1,
      expert=64,
      tensor=1,
    ),
  )
  config.train.num_steps = 600_000
  config.train.batch_size = 1024
  return config
