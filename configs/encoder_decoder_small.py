"""A small Switch encoder-decoder that restores spans of the standard library's text.

Command:  python -m experiments.train --config=configs/encoder_decoder_small.py
"""

from moejax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig


def get_config() -> Config:
  config = Config(
    data=DataConfig(
      tokenizer="bpe",
      vocab_size=1024,
      sequence_length=128,
      objective="span_corruption",
    ),
    model=ModelConfig(
      kind="encoder_decoder",
      num_layers=2,
      encoder_layers=4,
      width=128,
      num_heads=2,
      hidden=256,
      activation="relu",
      positions="relative",
      vocab_multiple=8,
      scan_layers=False,
    ),
    moe=MoEConfig(num_experts=8, num_selected=1, hidden=256, group_size=512),
    optimizer=OptimizerConfig(name="muon", learning_rate=2e-2, warmup_steps=50),
  )
  config.train.num_steps = 600
  config.train.batch_size = 16
  config.train.eval_batches = 20
  config.train.eval_every = config.train.checkpoint_every = 300
  return config
