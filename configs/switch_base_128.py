"""Switch-Base with 128 experts (arXiv:2101.03961, table 9): 7,415,217,408 parameters.

12 + 12 layers of D 768 with 12 heads of 64; every second feed-forward has 128 ReLU
experts of F 3072, as in the released weights (google/switch-base-128). The paper's table
gives GEGLU and F 2048, which has the same count: three matrices of two thirds the width.
Tied embedding, whose head has scale D^-0.5.

Command:  python -m tools.count --config=configs/switch_base_128.py
Hardware: never run here, only counted
Result:   7,415,217,408 parameters
"""

from moejax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig


def get_config() -> Config:
  config = Config(
    data=DataConfig(
      name="c4",
      tokenizer="bpe",
      vocab_size=32_000,
      sequence_length=512,
      objective="span_corruption",
      decoder_length=120,
    ),
    model=ModelConfig(
      kind="encoder_decoder",
      num_layers=12,
      width=768,
      num_heads=12,
      head_dim=64,
      hidden=3072,
      activation="relu",
      vocab_size=32_128,
      tie_embeddings=True,
      logits_divisor=768**0.5,
      positions="relative",
      attention_scale=1.0,
      dtype="bfloat16",
      remat="full",
    ),
    moe=MoEConfig(
      num_experts=128,
      num_selected=1,
      hidden=3072,
      every=2,
      offset=1,
      capacity_factor=1.25,
      eval_capacity_factor=2.0,
      jitter=0.01,
    ),
    mesh=MeshConfig(data=1, expert=-1),
  )
  config.optimizer.name = "adafactor"
  config.optimizer.schedule, config.optimizer.learning_rate = "inverse_sqrt", 0.01
  config.optimizer.warmup_steps = 10_000
  config.train.num_steps, config.train.batch_size = 550_000, 2048
  return config
