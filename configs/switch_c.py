"""Switch-C (arXiv:2101.03961, table 9): 1.571e12 parameters.

15 + 15 layers of D 2080 with 32 heads of 64; every feed-forward has 2048 ReLU experts of
F 6144. For a pod of TPUs, whose tiles an eighth of 2080 does not fill, there is
configs/switch_c_decoder.py. Tied embedding, whose head has scale D^-0.5.

Command:  python -m tools.count --config=configs/switch_c.py
Hardware: never run here, only counted
Result:   1.571e12 parameters
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
      num_layers=15,
      width=2080,
      num_heads=32,
      head_dim=64,
      hidden=6144,
      activation="relu",
      vocab_size=32_128,
      tie_embeddings=True,
      logits_divisor=2080**0.5,
      positions="relative",
      attention_scale=1.0,
      dtype="bfloat16",
      remat="full",
    ),
    moe=MoEConfig(
      num_experts=2048,
      num_selected=1,
      hidden=6144,
      every=1,
      offset=0,
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
