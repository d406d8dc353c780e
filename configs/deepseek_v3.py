r"""DeepSeek-V3 (arXiv:2412.19437): 671B parameters, 37.6B active, latent attention.

61 layers of D 7168, of which the first three are dense (18,432); 256 experts of F 2048
and one shared, each token uses eight, chosen by biased sigmoid scores within four of
eight groups. 671,026,419,200 numbers, 14,848 of which are the biases of choice;
the layer that predicts a second token is left out. Sizes are those of the released
config.json, YaRN's extension to 163,840 tokens included.

Dropless, one sequence per chip: tokens go to the experts in four parts, each with room
for any load, and a part must hold whole routing groups, so these are a quarter of a
sequence, where the paper balances whole ones. On few devices set
`--config.moe.exchange_chunks=1`.

Command:  python -m tools.compile_for --config=configs/deepseek_v3.py \\
              --topology=v5p:8x8x8 --config.mesh.fsdp=8
Hardware: 512 chips of a v5p pod; never run, only compiled
Result:   fits, 97.9 of 102.0 GB per chip; docs/scale.md
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
    data=DataConfig(name="c4", tokenizer="bpe", vocab_size=129_280, sequence_length=4096),
    model=ModelConfig(
      num_layers=61,
      width=7168,
      num_heads=128,
      attention="latent",
      q_rank=1536,
      kv_rank=512,
      nope_head_dim=128,
      rope_head_dim=64,
      value_head_dim=128,
      hidden=18_432,
      activation="swiglu",
      vocab_size=129_280,
      tie_embeddings=False,
      rope_interleaved=True,
      rope_scaling="yarn",
      rope_factor=40.0,
      rope_original=4096,
      rope_mscale_all_dim=1.0,
      max_position=163_840,
      dtype="bfloat16",
      remat="all",
    ),
    moe=MoEConfig(
      num_experts=256,
      num_selected=8,
      hidden=2048,
      num_shared=1,
      renormalize="before_drop",
      gate_scale=2.5,
      every=1,
      offset=0,
      dense_prefix=3,
      capacity_factor=None,
      group_size=1024,
      exchange_chunks=4,
      balance_weight=1e-4,
      z_weight=0.0,
    ),
    optimizer=OptimizerConfig(learning_rate=2.2e-4, warmup_steps=2000),
    mesh=MeshConfig(data=1, fsdp=-1, expert=64, tensor=1),
  )
  config.moe.use_router(
    "sigmoid_bias", num_expert_groups=8, num_selected_groups=4, group_best=2
  )
  config.train.num_steps = 250_000
  config.train.batch_size = 512
  return config
