"""Kimi K2 (arXiv:2507.20534): 1,026,408,232,448 parameters, 32,861,500,928 active.

DeepSeek-V3's design with 64 heads, one dense layer, and 384 experts in one group, of
which each token uses eight; 23,040 of the numbers are the biases of choice. Sizes are
those of config.json of moonshotai/Kimi-K2-Base. Muon stands for the paper's MuonClip.

Command:  python -m tools.count --config=configs/kimi_k2.py
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
      vocab_size=163_840,
      sequence_length=4096,
    ),
    model=ModelConfig(
      num_layers=61,
      width=7168,
      num_heads=64,
      attention="latent",
      q_rank=1536,
      kv_rank=512,
      nope_head_dim=128,
      rope_head_dim=64,
      value_head_dim=128,
      hidden=18_432,
      activation="swiglu",
      vocab_size=163_840,
      tie_embeddings=False,
      rope_theta=50_000.0,
      rope_interleaved=True,
      rope_scaling="yarn",
      rope_factor=32.0,
      rope_original=4096,
      rope_beta_fast=1.0,
      rope_mscale_all_dim=1.0,
      max_position=131_072,
      dtype="bfloat16",
      remat="all",
    ),
    moe=MoEConfig(
      num_experts=384,
      num_selected=8,
      hidden=2048,
      num_shared=1,
      router="sigmoid_bias",
      renormalize="before_drop",
      gate_scale=2.827,
      every=1,
      offset=0,
      dense_prefix=1,
      capacity_factor=None,
      group_size=1024,
      exchange_chunks=32,
      balance_weight=1e-4,
      z_weight=0.0,
    ),
    optimizer=OptimizerConfig(
      name="muon",
      learning_rate=2e-4,
      warmup_steps=500,
    ),
    mesh=MeshConfig(
      data=1,
      fsdp=-1,
      expert=64,
      tensor=1,
    ),
  )
  config.train.num_steps = 230_000
  config.train.batch_size = 16_384
  return config
