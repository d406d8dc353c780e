r"""A model of GPT-4's rumoured size: 1.83T parameters, 280B active. No published source.

The rumour (SemiAnalysis, July 2023): 120 layers, 16 experts of 111B parameters each, of
which a token uses two, and 55B shared in attention. D 10,752 with four matrices of
attention and ungated experts of four times the width gives all three; the vocabulary is
that of cl100k, padded. Everything else is chosen here.

Command:  python -m tools.compile_for --config=configs/gpt4_class_1_8t.py \\
              --topology=v5p:8x8x16
Hardware: 1,024 chips of a v5p pod; never run, only compiled
Result:   docs/scale.md
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
      vocab_size=100_277,
      sequence_length=4096,
    ),
    model=ModelConfig(
      num_layers=120,
      width=10_752,
      num_heads=84,
      activation="gelu",
      vocab_size=100_352,
      tie_embeddings=False,
      dtype="bfloat16",
      remat="all",
    ),
    moe=MoEConfig(
      num_experts=16,
      num_selected=2,
      hidden=43_008,
      router="top_k",
      renormalize="before_drop",
      every=1,
      offset=0,
      capacity_factor=None,
      expert_chunks=8,
    ),
    optimizer=OptimizerConfig(
      learning_rate=1e-4,
      warmup_steps=2000,
    ),
    mesh=MeshConfig(
      data=1,
      fsdp=-1,
      expert=16,
      tensor=1,
    ),
  )
  config.train.num_steps = 200_000
  config.train.batch_size = 1024
  return config
