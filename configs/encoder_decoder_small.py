"""A small Switch encoder-decoder that restores spans of the standard library's text.

Four layers in the encoder, two in the decoder; rows of 128 and 32 tokens, of which 95%
and 86% are text, the rest padding.

Command:  python -m experiments.train --config=configs/encoder_decoder_small.py
Hardware: 2 cores, Python 3.11
Run time: about 5 minutes of one core's time; 22 minutes on cores that other programs kept
          busy
Result:   validation loss 3.874 nats/target over all 33,445 targets, one seed (the unigram
          entropy of targets is 5.471); 20% of tokens dropped at the end, all of them in
          the encoder, whose router still has even probabilities after so few targets
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
