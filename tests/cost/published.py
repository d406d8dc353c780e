"""Published models as configurations, with the figures their makers give.

Only what this decoder can express exactly is here. Sources stand with each.
"""

from moejax.config import Config, DataConfig, ModelConfig, MoEConfig


def mixtral_8x7b() -> Config:
  """arXiv:2401.04088, table 1; 46,702,792,704 parameters in the released weights."""
  return Config(
    data=DataConfig(sequence_length=4096),
    model=ModelConfig(
      num_layers=32,
      width=4096,
      num_heads=32,
      num_kv_heads=8,
      activation="swiglu",
      vocab_size=32_000,
      tie_embeddings=False,
    ),
    moe=MoEConfig(num_experts=8, num_selected=2, hidden=14_336, every=1, offset=0),
  )


def olmoe_1b_7b() -> Config:
  """arXiv:2409.02060, table 10; 6,919,161,856 parameters in the released weights."""
  return Config(
    data=DataConfig(sequence_length=4096),
    model=ModelConfig(
      num_layers=16,
      width=2048,
      num_heads=16,
      activation="swiglu",
      vocab_size=50_304,
      tie_embeddings=False,
      qk_norm=True,
      qk_norm_scope="width",
    ),
    moe=MoEConfig(num_experts=64, num_selected=8, hidden=1024, every=1, offset=0),
  )


def qwen3_30b_a3b() -> Config:
  """arXiv:2505.09388, table 2; 30,532,122,624 parameters; QK-norm over each head."""
  return Config(
    data=DataConfig(sequence_length=4096),
    model=ModelConfig(
      num_layers=48,
      width=2048,
      num_heads=32,
      num_kv_heads=4,
      head_dim=128,
      activation="swiglu",
      vocab_size=151_936,
      tie_embeddings=False,
      qk_norm=True,
    ),
    moe=MoEConfig(num_experts=128, num_selected=8, hidden=768, every=1, offset=0),
  )


def deepseek_moe_16b() -> Config:
  """arXiv:2401.06066, section 5.1.2: one dense layer first, 2 shared + 6 of 64."""
  return Config(
    data=DataConfig(sequence_length=4096),
    model=ModelConfig(
      num_layers=28,
      width=2048,
      num_heads=16,
      hidden=10_944,
      activation="swiglu",
      vocab_size=102_400,
      tie_embeddings=False,
    ),
    moe=MoEConfig(
      # 16 experts of width 4*1408, each cut into 4: 64 of width 1408, 6 chosen, is
      # not a multiple of the segmentation, so it is written out unsegmented.
      num_experts=64,
      num_selected=6,
      num_shared=2,
      hidden=1408,
      every=1,
      offset=0,
      dense_prefix=1,
    ),
  )


def _dense(model: ModelConfig, sequence_length: int) -> Config:
  moe = MoEConfig(dense_prefix=model.num_layers)
  return Config(data=DataConfig(sequence_length=sequence_length), model=model, moe=moe)


def llama2_7b() -> Config:
  """arXiv:2307.09288; 6,738,415,616 parameters in the released weights."""
  return _dense(
    ModelConfig(
      num_layers=32,
      width=4096,
      num_heads=32,
      hidden=11_008,
      activation="swiglu",
      vocab_size=32_000,
      tie_embeddings=False,
    ),
    4096,
  )


def deepseek_7b() -> Config:
  """arXiv:2401.02954, table 2."""
  return _dense(
    ModelConfig(
      num_layers=30,
      width=4096,
      num_heads=32,
      hidden=11_008,
      activation="swiglu",
      vocab_size=102_400,
      tie_embeddings=False,
    ),
    4096,
  )


def qwen2_0_5b() -> Config:
  """arXiv:2407.10671, table 1; 494,032,768 parameters: tied, QKV biases."""
  return _dense(
    ModelConfig(
      num_layers=24,
      width=896,
      num_heads=14,
      num_kv_heads=2,
      hidden=4864,
      activation="swiglu",
      vocab_size=151_936,
      tie_embeddings=True,
      attention_bias=True,
    ),
    4096,
  )


def palm_540b() -> Config:
  """arXiv:2204.02311, table 1: multi-query, 540.35B parameters, tied, no biases.

  Its parallel layers have one norm where ours have two: 2M numbers of 540B.
  """
  return _dense(
    ModelConfig(
      num_layers=118,
      width=18_432,
      num_heads=48,
      num_kv_heads=1,
      head_dim=256,
      hidden=73_728,
      activation="swiglu",
      vocab_size=256_000,
      tie_embeddings=True,
    ),
    2048,
  )


def deepseek_v2_lite() -> Config:
  """arXiv:2405.04434, appendix B; 15,706,484,224 parameters in the released weights."""
  return Config(
    data=DataConfig(sequence_length=4096),
    model=ModelConfig(
      num_layers=27,
      width=2048,
      num_heads=16,
      hidden=10_944,
      activation="swiglu",
      vocab_size=102_400,
      tie_embeddings=False,
      attention="latent",
      kv_rank=512,
      nope_head_dim=128,
      rope_head_dim=64,
      value_head_dim=128,
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
    ),
  )


def deepseek_v3() -> Config:
  """arXiv:2412.19437, section 4.2; 671,026,404,352 parameters in the released weights,
  without the 58 * 256 correction biases and the layer of multi-token prediction."""
  config = deepseek_v2_lite()
  model, moe = config.model, config.moe
  model.num_layers, model.width, model.num_heads = 61, 7168, 128
  model.hidden, model.vocab_size, model.q_rank = 18_432, 129_280, 1536
  moe.num_experts, moe.num_selected, moe.hidden = 256, 8, 2048
  moe.num_shared, moe.dense_prefix = 1, 3
  return config
