"""OLMoE-1B-7B (arXiv:2409.02060): 6,919,161,856 parameters, 1,282,017,280 active.

16 layers of D 2048, 64 experts of F 1024, eight for each token, gates as they are;
RMSNorm over the full width of queries and keys. Sizes are those of config.json of
allenai/OLMoE-1B-7B-0924; losses, schedule and batch are the paper's (table 10).

Command:  python -m tools.count --config=configs/olmoe_1b_7b.py
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
      vocab_size=50_304,
      sequence_length=4096,
    ),
    model=ModelConfig(
      num_layers=16,
      width=2048,
      num_heads=16,
      activation="swiglu",
      vocab_size=50_304,
      tie_embeddings=False,
      qk_norm=True,
      qk_norm_scope="width",
      norm_eps=1e-5,
      dtype="bfloat16",
      remat="all",
    ),
    moe=MoEConfig(
      num_experts=64,
      num_selected=8,
      hidden=1024,
      router="top_k",
      every=1,
      offset=0,
      capacity_factor=None,
    ),
    optimizer=OptimizerConfig(
      learning_rate=4e-4,
      warmup_steps=2500,
    ),
    mesh=MeshConfig(
      data=1,
      fsdp=-1,
      expert=8,
      tensor=1,
    ),
  )
  config.train.num_steps = 1_220_000
  config.train.batch_size = 1024
  return config
