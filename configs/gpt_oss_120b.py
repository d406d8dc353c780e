"""gpt-oss-120b (arXiv:2508.10925): 116,829,156,672 parameters.

5,711,982,912 active; the 5.13B of its card leave the embedding out. 36 layers of D 2880
with 64 query and 8 key/value heads of 64, sinks, and a window of 128 in every other
layer; 128 experts of F 2880, four for each token, with clamped SwiGLU and biases
everywhere. Sizes are those of config.json of openai/gpt-oss-120b, whose YaRN is from
4,096 to 131,072 tokens.

Command:  python -m tools.count --config=configs/gpt_oss_120b.py
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
      vocab_size=201_088,
      sequence_length=4096,
    ),
    model=ModelConfig(
      num_layers=36,
      width=2880,
      num_heads=64,
      num_kv_heads=8,
      head_dim=64,
      activation="clamped_swiglu",
      vocab_size=201_088,
      tie_embeddings=False,
      attention_bias=True,
      attention_out_bias=True,
      attention_sinks=True,
      sliding_window=128,
      window_pattern="sliding,full",
      rope_theta=150_000.0,
      rope_scaling="yarn",
      rope_factor=32.0,
      rope_original=4096,
      rope_truncate=False,
      norm_eps=1e-5,
      max_position=131_072,
      dtype="bfloat16",
      remat="all",
    ),
    moe=MoEConfig(
      num_experts=128,
      num_selected=4,
      hidden=2880,
      expert_bias=True,
      router_bias=True,
      router="top_k",
      renormalize="before_drop",
      every=1,
      offset=0,
      capacity_factor=None,
    ),
    optimizer=OptimizerConfig(
      learning_rate=3e-4,
      warmup_steps=2000,
    ),
    mesh=MeshConfig(
      data=1,
      fsdp=-1,
      expert=8,
      tensor=1,
    ),
  )
  config.train.num_steps = 250_000
  config.train.batch_size = 1024
  return config
