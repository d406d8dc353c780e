"""DeepSeekMoE-16B (arXiv:2401.06066): 16,375,728,128 parameters, 2,828,650,496 active.

28 layers of D 2048, the first dense (10,944); 64 experts of F 1408 and two shared, six
for each token, gates as they are. Written with 64 whole experts: six choices are no
multiple of the four segments that the paper cuts an expert into.

Command:  python -m tools.count --config=configs/deepseek_moe_16b.py
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
      vocab_size=102_400,
      sequence_length=4096,
    ),
    model=ModelConfig(
      num_layers=28,
      width=2048,
      num_heads=16,
      hidden=10_944,
      activation="swiglu",
      vocab_size=102_400,
      tie_embeddings=False,
      dtype="bfloat16",
      remat="all",
    ),
    moe=MoEConfig(
      num_experts=64,
      num_selected=6,
      hidden=1408,
      num_shared=2,
      router="top_k",
      every=1,
      offset=0,
      dense_prefix=1,
      capacity_factor=None,
      balance_weight=0.001,
      z_weight=0.0,
    ),
    optimizer=OptimizerConfig(
      learning_rate=4.2e-4,
      warmup_steps=2000,
    ),
    mesh=MeshConfig(
      data=1,
      fsdp=-1,
      expert=8,
      tensor=1,
    ),
  )
  config.train.num_steps = 106_449
  config.train.batch_size = 4608
  return config
