"""Switch-XXL (arXiv:2101.03961, table 9): 395e9 parameters.

24 + 24 layers of D 4096 with 64 heads of 64; every second feed-forward has experts of
three GEGLU matrices of F 10240. The table gives 395e9 parameters, which 128 experts have,
as the released weights do (google/switch-xxl-128). Untied output head.

Command:  python -m tools.count --config=configs/switch_xxl.py
Hardware: never run here, only counted
Result:   395e9 parameters
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
      num_layers=24,
      width=4096,
      num_heads=64,
      head_dim=64,
      hidden=10240,
      activation="geglu",
      vocab_size=32_128,
      tie_embeddings=False,
      positions="relative",
      attention_scale=1.0,
      dtype="bfloat16",
      remat="full",
    ),
    moe=MoEConfig(
      num_experts=128,
      num_selected=1,
      hidden=10240,
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
