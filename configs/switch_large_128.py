"""Switch-Large with 128 experts (arXiv:2101.03961, table 9): 26.3e9 parameters.

24 + 24 layers of D 1024 with 16 heads of 64; every second feed-forward has 128 ReLU
experts of F 4096, as T5-Large. The paper's table gives 26e9 parameters.
Tied embedding, whose head has scale D^-0.5.

Command:  python -m tools.count --config=configs/switch_large_128.py
Hardware: never run here, only counted
Result:   26.3e9 parameters
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
      width=1024,
      num_heads=16,
      head_dim=64,
      hidden=4096,
      activation="relu",
      vocab_size=32_128,
      tie_embeddings=True,
      logits_divisor=1024**0.5,
      positions="relative",
      attention_scale=1.0,
      dtype="bfloat16",
      remat="full",
    ),
    moe=MoEConfig(
      num_experts=128,
      num_selected=1,
      hidden=4096,
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
