"""Qwen1.5-MoE-A2.7B: 14,315,784,192 parameters, 2,689,173,504 active.

24 layers of D 2048, 60 experts of F 1408, four for each token, gates as they are, and a
shared expert of 5632 with a gate of its own; biases on queries, keys and values
(config.json of Qwen/Qwen1.5-MoE-A2.7B). The name counts active parameters.

Command:  python -m tools.count --config=configs/qwen2_moe_a2_7b.py
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
      num_layers=24,
      width=2048,
      num_heads=16,
      hidden=5632,
      activation="swiglu",
      vocab_size=151_936,
      tie_embeddings=False,
      attention_bias=True,
      rope_theta=1e6,
      max_position=8192,
      dtype="bfloat16",
      remat="all",
    ),
    moe=MoEConfig(
      num_experts=60,
      num_selected=4,
      hidden=1408,
      shared_hidden=5632,
      shared_gate=True,
      router="top_k",
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
      expert=4,
      tensor=1,
    ),
  )
  config.train.num_steps = 250_000
  config.train.batch_size = 1024
  return config
