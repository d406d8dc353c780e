"""FLOPs per token: hand calculations, and figures that others published."""

import dataclasses
import math

import jax
import pytest

from moejax.config import Config, DataConfig, ModelConfig, MoEConfig
from moejax.cost import attention, flops, parameters
from moejax.models.decoder import Decoder
from tests.cost import published


def _training(config: Config, **kwargs) -> dict[str, float]:
  vocab_size = parameters.resolve_vocab_size(config)
  return flops.flops_per_token(config, vocab_size, **kwargs)


def test_every_part_equals_a_hand_calculation():
  """Two layers, the second MoE, D=8, V=10, S=4; every product written out.

  Attention projections, forward, per layer: q and o 8x(2*4), k and v 8x(1*4):
  2*(64+32+32+64) = 384. Scores: 2 heads of 4, 4 positions, two products:
  2*2*(2*4)*4 = 128. Dense layer, SwiGLU of 16: 2*3*8*16 = 768. MoE layer: 2*3 = 6
  experts of width 12/3 = 4, each 2*3*8*4 = 192 forward; 1*3 = 3 chosen: 576; two
  shared: 384; router 2*8*6 = 96. Head 2*8*10 = 160. Training is three times that.
  """
  config = Config(
    data=DataConfig(sequence_length=4),
    model=ModelConfig(
      num_layers=2,
      width=8,
      num_heads=2,
      num_kv_heads=1,
      hidden=16,
      activation="swiglu",
      vocab_size=10,
    ),
    moe=MoEConfig(
      num_experts=2, num_selected=1, segments=3, num_shared=2, hidden=12, router="top_k"
    ),
  )
  assert _training(config) == {
    "attention": 3 * 2 * 384,
    "attention_scores": 3 * 2 * 128,
    "dense": 3 * 768,
    "experts": 3 * 576,
    "shared_experts": 3 * 384,
    "router": 3 * 96,
    "head": 3 * 160,
    "total": 3 * (2 * 384 + 2 * 128 + 768 + 576 + 384 + 96 + 160),
  }


@pytest.mark.parametrize(
  ("make", "tera", "tolerance"),
  [
    (published.llama2_7b, 187.9, 0.006),
    (published.deepseek_7b, 183.5, 0.006),
    (published.deepseek_moe_16b, 74.4, 0.025),
  ],
)
def test_flops_per_4k_tokens_are_those_of_the_deepseekmoe_paper(make, tera, tolerance):
  """arXiv:2401.06066, tables 3 and 4, "FLOPs per 4K Tokens".

  The paper does not spell out what it counts, hence the tolerance. Leaving out the
  two shared experts would miss by 15%, so this cannot share a mistake about them.
  """
  counted = _training(make())["total"] * 4096 / 1e12
  assert counted == pytest.approx(tera, rel=tolerance)


def test_utilisation_of_palm_is_the_published_one():
  """arXiv:2204.02311, section 4.1 and appendix B: 238.3K tokens/s on 6,144 TPU v4
  of 275 TFLOP/s are 46.2% with attention and 45.7% without.
  """
  config = published.palm_540b()
  total, _ = parameters.count_parameters(config, 256_000)
  assert total["total"] / 1e9 == pytest.approx(540.35, abs=0.01)
  training = _training(config)
  scale = 238.3e3 / (6144 * 275e12)
  assert round(100 * scale * training["total"], 1) == 46.2
  without = training["total"] - training["attention_scores"]
  assert round(100 * scale * without, 1) == 45.7


def test_products_cost_six_flops_per_active_matrix_parameter():
  """The 6N rule: without scores, norms and the looked-up table, N is what is active."""
  config = published.mixtral_8x7b()
  _, active = parameters.count_parameters(config, 32_000)
  training = _training(config)
  matrices = active["total"] - active["norms"] - active["embedding"]
  assert training["total"] - training["attention_scores"] == 6 * matrices


@pytest.mark.parametrize("segments", [1, 4])
@pytest.mark.parametrize("num_shared", [0, 3])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_dense_twin_costs_the_same_but_for_the_router(segments, num_shared, activation):
  """K*F and the shared width in one dense layer: equal FLOPs, and no router."""
  config = Config(
    model=ModelConfig(activation=activation),
    moe=MoEConfig(
      num_experts=8,
      num_selected=2,
      segments=segments,
      num_shared=num_shared,
      router="top_k",
    ),
  )
  moe, twin = _training(config), _training(parameters.dense_twin(config))
  assert twin["total"] == moe["total"] - moe["router"]
  assert not config.moe.dense_twin


def test_more_experts_cost_only_router():
  """Sparse scaling: total parameters grow with E, work per token does not."""
  small, large = Config(), Config()
  large.moe.num_experts = 64
  a, b = _training(small), _training(large)
  changed = {part for part in flops.PARTS if a[part] != b[part]}
  assert changed == {"router"}


def test_causal_counts_exactly_the_pairs_of_the_mask():
  """Against the mask itself, with and without a window."""
  for length, window in [(1, 0), (7, 0), (7, 3), (7, 7), (7, 20)]:
    pairs = sum(
      1 for i in range(length) for j in range(i + 1) if not window or i - j < window
    )
    counted = attention.mean_context(length, window, causal=True)
    assert counted * length == pytest.approx(pairs)
  assert attention.mean_context(7, 0, causal=False) == 7
  assert attention.mean_context(7, 3, causal=False) == 3


def test_capacity_is_not_model_flops():
  """Empty slots and drops are the implementation's cost, never the model's."""
  config = Config()
  roomy = dataclasses.replace(config, moe=dataclasses.replace(config.moe))
  roomy.moe.capacity_factor = 4.0
  assert _training(config) == _training(roomy)


def test_latent_attention_and_a_window_pattern_by_hand():
  """Three layers, D=8, two heads, S=4; windows 2, all, 2.

  Projections, forward, per layer: queries 8x3 and 3x2*(4+2), 60; down 8*(5+2), 56; up
  5x2*(4+3), 70; out 2*3x8, 48: 2*234 = 468. Scores: 2 heads of key width 6 and value
  width 3 over 2, 4 and 2 positions: 2*2*9*8 = 288. Causal, a window of 2 over 4 tokens
  leaves (1+2+2+2)/4 positions and no window (1+2+3+4)/4: 2*2*9*(7+10+7)/4 = 216.
  """
  config = Config(
    data=DataConfig(sequence_length=4),
    model=ModelConfig(
      num_layers=3,
      width=8,
      num_heads=2,
      vocab_size=10,
      attention="latent",
      q_rank=3,
      kv_rank=5,
      nope_head_dim=4,
      rope_head_dim=2,
      value_head_dim=3,
      sliding_window=2,
      window_pattern="sliding,full",
    ),
  )
  counted = flops.forward_flops_per_token(config, 10)
  assert counted["attention"] == 3 * 468
  assert counted["attention_scores"] == 288
  causal = flops.forward_flops_per_token(config, 10, causal=True)
  assert causal["attention_scores"] == 216


def test_the_cache_holds_what_is_counted():
  """By the arrays: DeepSeek-V3 keeps 512 + 64 numbers per token and layer, Mixtral two
  times 8 heads of 128."""
  for make, expected in (
    (published.deepseek_v3, 61 * 576),
    (published.mixtral_8x7b, 32 * 2048),
  ):
    config = make()
    assert attention.cache_numbers_per_token(config.model) == expected
    decoder = Decoder(config.model, config.moe, vocab_size=8)
    cache = jax.eval_shape(lambda d=decoder: d.init_cache(1, 1))
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(cache.layers)]
    assert sum(sizes) == expected
