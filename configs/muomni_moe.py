"""The optional MoE layer of μOmni, an educational model of 120M parameters, as a decoder.

D 256, eight GELU experts of F = 4D/E = 128, two for each token, with renormalised gates,
no biases, dropless. Depth, heads and vocabulary are those of configs/default.py:
3,418,368 parameters, 1,845,504 active.

Command:  python -m tools.count --config=configs/muomni_moe.py
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
      tokenizer="bpe",
      vocab_size=1024,
      sequence_length=128,
    ),
    model=ModelConfig(
      num_layers=4,
      width=256,
      num_heads=2,
      activation="gelu",
    ),
    moe=MoEConfig(
      num_experts=8,
      num_selected=2,
      hidden=128,
      router="top_k",
      renormalize="before_drop",
      every=1,
      offset=0,
      capacity_factor=None,
    ),
    optimizer=OptimizerConfig(
      learning_rate=1e-3,
      warmup_steps=100,
    ),
    mesh=MeshConfig(
      data=-1,
    ),
  )
  config.train.num_steps = 900
  config.train.batch_size = 16
  return config
