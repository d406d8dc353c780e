"""DeepSeek-V2-Lite (arXiv:2405.04434, appendix B): 15,706,484,224 parameters.

2,661,150,208 active. 27 layers of D 2048, the first dense (10,944), latent attention
with queries of full rank; 64 experts of F 1408 and two shared, six for each token, gates
as they are. Sizes are those of the released config.json, YaRN's extension to 163,840
tokens included.

Command:  python -m tools.count --config=configs/deepseek_v2_lite.py
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
      num_layers=27,
      width=2048,
      num_heads=16,
      attention="latent",
      kv_rank=512,
      nope_head_dim=128,
      rope_head_dim=64,
      value_head_dim=128,
      hidden=10_944,
      activation="swiglu",
      vocab_size=102_400,
      tie_embeddings=False,
      rope_interleaved=True,
      rope_scaling="yarn",
      rope_factor=40.0,
      rope_original=4096,
      rope_mscale=0.707,
      rope_mscale_all_dim=0.707,
      max_position=163_840,
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
  config.train.num_steps = 300_000
  config.train.batch_size = 4608
  return config
