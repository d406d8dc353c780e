r"""A decoder of Switch-C's size (arXiv:2101.03961, table 9): 1.57T parameters.

30 layers of D 2048 with 32 heads of 64; every feed-forward is a Switch layer of 2,048
ReLU experts of F 6240, top-1, capacity factor 1.25. Switch-C itself is an
encoder-decoder of 15 + 15 such layers with D 2080 and F 6144, which gives experts of the
same size: but an eighth of 2080 is not a whole number of TPU tiles, and the compiler
would all-reduce gradients that it can otherwise reduce-scatter. For a similar reason the
vocabulary has room for 32,256 entries (docs/scale.md).

One routing group per chip, so that 8,192 tokens have 5 slots at each expert; the experts
are spread over a plane of 128 chips (8x16), and each is sharded over the eight planes.

Command:  python -m tools.compile_for --config=configs/switch_c_decoder.py \\
              --topology=v5p:8x8x16
Hardware: 1,024 chips of a v5p pod; never run, only compiled
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
    data=DataConfig(name="c4", tokenizer="bpe", vocab_size=32_128, sequence_length=1024),
    model=ModelConfig(
      num_layers=30,
      width=2048,
      num_heads=32,
      head_dim=64,
      hidden=6240,
      activation="relu",
      vocab_size=32_256,
      tie_embeddings=False,
      dtype="bfloat16",
      remat="full",
    ),
    moe=MoEConfig(
      num_experts=2048,
      num_selected=1,
      hidden=6240,
      router="switch",
      every=1,
      offset=0,
      capacity_factor=1.25,
      group_size=8192,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10_000),
    mesh=MeshConfig(data=1, fsdp=8, expert=-1, tensor=1),
  )
  config.train.num_steps = 500_000
  config.train.batch_size = 8192
  return config
