"""GLM-4.5-Air (arXiv:2508.06471): 106,852,251,264 parameters, 13,424,129,664 active.

46 layers of D 4096 with 96 query and 8 key/value heads of 128, half of which rotates,
the first layer dense (10,944); 128 experts of F 1408 and one shared, eight for each token
by biased sigmoid scores, with renormalised gates; 5,760 of the numbers are the biases of
choice. The layer that predicts a second token is left out. Sizes are those of
config.json of zai-org/GLM-4.5-Air-Base.

Command:  python -m tools.count --config=configs/glm_4_5_air.py
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
      vocab_size=151_552,
      sequence_length=4096,
    ),
    model=ModelConfig(
      num_layers=46,
      width=4096,
      num_heads=96,
      num_kv_heads=8,
      head_dim=128,
      hidden=10_944,
      activation="swiglu",
      vocab_size=151_552,
      tie_embeddings=False,
      attention_bias=True,
      rope_theta=1e6,
      rope_fraction=0.5,
      norm_eps=1e-5,
      max_position=131_072,
      dtype="bfloat16",
      remat="all",
    ),
    moe=MoEConfig(
      num_experts=128,
      num_selected=8,
      hidden=1408,
      num_shared=1,
      router="sigmoid_bias",
      renormalize="before_drop",
      every=1,
      offset=0,
      dense_prefix=1,
      capacity_factor=None,
      balance_weight=1e-4,
      z_weight=0.0,
    ),
    optimizer=OptimizerConfig(
      name="muon",
      learning_rate=2.5e-4,
      warmup_steps=2000,
    ),
    mesh=MeshConfig(
      data=1,
      fsdp=-1,
      expert=16,
      tensor=1,
    ),
  )
  config.train.num_steps = 100_000
  config.train.batch_size = 4096
  return config
