r"""Mixtral 8x7B (arXiv:2401.04088, table 1) on a pod: 46,702,792,704 parameters.

32 layers of D 4096 with 32 query and 8 key/value heads; every feed-forward is an MoE
layer of eight SwiGLU experts of F 14336, of which each token uses two, with
renormalised gates. Dropless: rows travel over `expert` into a buffer of 1.25 times an
even load; what overflows it is dropped and counted, and
`--config.moe.exchange_buffer=none` makes room for any load.

Command:  python -m tools.compile_for --config=configs/mixtral_8x7b.py \\
              --topology=v5p:4x4x8
Hardware: 128 chips of a v5p pod, or a pod of another size; never run, only compiled
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
    data=DataConfig(name="c4", tokenizer="bpe", vocab_size=32_000, sequence_length=4096),
    model=ModelConfig(
      num_layers=32,
      width=4096,
      num_heads=32,
      num_kv_heads=8,
      hidden=14_336,
      activation="swiglu",
      vocab_size=32_000,
      tie_embeddings=False,
      rope_theta=1e6,
      norm_eps=1e-5,
      max_position=32_768,
      dtype="bfloat16",
      remat="all",
    ),
    moe=MoEConfig(
      num_experts=8,
      num_selected=2,
      hidden=14_336,
      router="top_k",
      renormalize="before_drop",
      every=1,
      offset=0,
      capacity_factor=None,
      exchange_buffer=1.25,
      expert_chunks=8,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    mesh=MeshConfig(data=1, fsdp=-1, expert=8, tensor=1),
  )
  config.train.num_steps = 100_000
  config.train.batch_size = 1024
  return config
