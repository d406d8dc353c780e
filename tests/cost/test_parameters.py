"""Parameter counts: anchored on published models, then on the model's own tree."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import pytest

from moejax.config import Config, ModelConfig, MoEConfig
from moejax.config.pattern import layer_pattern
from moejax.cost import flops, parameters
from moejax.models.decoder import Decoder
from moejax.plan import wire_bound
from tests.cost import published


def _count(config: Config) -> tuple[dict[str, int], dict[str, int]]:
  return parameters.count_parameters(config, parameters.resolve_vocab_size(config))


@pytest.mark.parametrize(
  ("make", "expected"),
  [
    (published.mixtral_8x7b, 46_702_792_704),
    (published.olmoe_1b_7b, 6_919_161_856),
    (published.qwen3_30b_a3b, 30_532_122_624),
    (published.deepseek_v2_lite, 15_706_484_224),
    (published.deepseek_v3, 671_026_404_352),
    (published.deepseek_moe_16b, 16_375_728_128),
    (published.llama2_7b, 6_738_415_616),
    (published.qwen2_0_5b, 494_032_768),
  ],
)
def test_totals_are_exactly_the_published_ones(make, expected):
  """A preset of a published model has its published count, to the last parameter."""
  total, _ = _count(make())
  assert total["total"] == expected


@pytest.mark.parametrize(
  ("make", "billions"),
  [
    (published.mixtral_8x7b, 12.9),
    (published.olmoe_1b_7b, 1.3),
    (published.deepseek_moe_16b, 2.8),
  ],
)
def test_active_parameters_round_to_the_published_ones(make, billions):
  """Makers give one decimal of the active count, the embedding table included."""
  _, active = _count(make())
  assert round(active["total"] / 1e9, 1) == billions


def test_active_parameters_of_mixtral_by_hand():
  """All but 6 of 8 experts of 3 matrices in 32 layers."""
  total, active = _count(published.mixtral_8x7b())
  assert total["total"] - active["total"] == 32 * 6 * 3 * 4096 * 14_336
  assert active["total"] == 12_879_925_248


def test_dense_models_are_all_active():
  """Without an MoE layer every parameter is used by every token."""
  total, active = _count(published.llama2_7b())
  assert total == active


def test_under_router_dense_every_expert_is_active():
  """K is E there, whatever num_selected says: in parameters, in FLOPs and in its twin."""
  config = Config(moe=MoEConfig(router="dense", num_experts=4, num_selected=1))
  total, active = _count(config)
  assert active["experts"] == total["experts"] > 0
  one = Config(moe=MoEConfig(router="switch", num_experts=4))
  vocab = parameters.resolve_vocab_size(config)
  every = flops.forward_flops_per_token(config, vocab)["experts"]
  assert every == 4 * flops.forward_flops_per_token(one, vocab)["experts"]
  twin = flops.forward_flops_per_token(parameters.dense_twin(config), vocab)
  dense_layers = flops.forward_flops_per_token(config, vocab)["dense"]
  assert twin["dense"] == dense_layers + every


def test_segmenting_experts_changes_only_the_router():
  """m*E experts of width F/m, m*K chosen: same expert weights, m times the router."""
  coarse = Config(moe=MoEConfig(num_experts=4, num_selected=2, hidden=64))
  fine = dataclasses.replace(coarse, moe=dataclasses.replace(coarse.moe, segments=4))
  (total, active), (fine_total, fine_active) = _count(coarse), _count(fine)
  assert fine_total["router"] == 4 * total["router"]
  for part in set(parameters.PARTS) - {"router"}:
    assert fine_total[part] == total[part]
    assert fine_active[part] == active[part]


_LATENT: dict[str, Any] = {
  "kv_rank": 24,
  "nope_head_dim": 10,
  "rope_head_dim": 6,
  "value_head_dim": 14,
}
_VARIANTS = {
  "default": Config(),
  "fine_grained_shared": Config(
    model=ModelConfig(activation="swiglu", tie_embeddings=False),
    moe=MoEConfig(
      num_experts=4, num_selected=2, segments=4, num_shared=2, router="top_k"
    ),
  ),
  "grouped_queries_biased": Config(
    model=ModelConfig(num_kv_heads=2, head_dim=16, attention_bias=True, qk_norm=True),
    moe=MoEConfig(num_experts=3, router="top_k", num_selected=1),
  ),
  "width_norm_sinks_out_bias": Config(
    model=ModelConfig(
      num_kv_heads=2,
      qk_norm=True,
      qk_norm_scope="width",
      attention_sinks=True,
      attention_out_bias=True,
    ),
  ),
  "latent": Config(model=ModelConfig(attention="latent", **_LATENT)),
  "latent_low_rank_biased": Config(
    model=ModelConfig(
      attention="latent",
      q_rank=20,
      attention_bias=True,
      attention_out_bias=True,
      attention_sinks=True,
      **_LATENT,
    )
  ),
  "dense_prefix": Config(
    model=ModelConfig(num_layers=5, hidden=96),
    moe=MoEConfig(every=2, offset=1, dense_prefix=1),
  ),
  "all_layers": Config(moe=MoEConfig(every=1, offset=0)),
  "noise": Config(moe=MoEConfig(router="noisy_top_k", num_selected=2)),
  "fixed_noise": Config(
    moe=MoEConfig(
      router="noisy_top_k", num_selected=2, options={"noisy_top_k": {"noise": "fixed"}}
    )
  ),
  "shared_gate": Config(
    moe=MoEConfig(
      num_experts=4, num_selected=2, router="top_k", shared_hidden=40, shared_gate=True
    )
  ),
  "quantile_balancing": Config(moe=MoEConfig(router="quantile_balancing")),
  "dense": Config(moe=MoEConfig(router="dense", num_shared=1)),
  "dense_router_twin": Config(
    moe=MoEConfig(router="dense", num_shared=1, segments=2, dense_twin=True)
  ),
  "bias": Config(moe=MoEConfig(router="sigmoid_bias", num_selected=2, segments=2)),
  "soft": Config(moe=MoEConfig(router="soft", group_size=48, capacity_factor=0.7)),
  "twin": Config(
    moe=MoEConfig(
      num_experts=4,
      num_selected=2,
      segments=4,
      num_shared=3,
      router="top_k",
      dense_twin=True,
    )
  ),
}


@pytest.mark.parametrize("name", _VARIANTS)
def test_formula_equals_the_models_own_parameter_tree(name):
  """The closed formula and the tree the decoder would allocate agree in the sum."""
  config = _VARIANTS[name]
  vocab_size = parameters.resolve_vocab_size(config)
  model = Decoder(config.model, config.moe, vocab_size=vocab_size)
  leaves = jax.tree.leaves(model.shapes())
  total, _ = parameters.count_parameters(config, vocab_size)
  assert sum(math.prod(leaf.shape) for leaf in leaves) == total["total"]


def test_the_table_of_hash_routing_is_data_and_not_counted():
  """Router hash: the formula leaves out exactly the [V, K] table."""
  config = Config(moe=MoEConfig(router="hash", num_selected=2))
  model = Decoder(config.model, config.moe, vocab_size=264)
  shapes = model.shapes()
  assert shapes.pop("hash_table").shape == (264, 2)
  total, _ = parameters.count_parameters(config, 264)
  leaves = jax.tree.leaves(shapes)
  assert sum(math.prod(leaf.shape) for leaf in leaves) == total["total"]


def test_plan_and_model_agree_on_which_layers_are_moe():
  """Over all offsets, prefixes and remainders: the layers by index, and how many of them
  the bound on a step's traffic counts (its bytes, over those of a single layer)."""
  one = Config(model=ModelConfig(num_layers=1), moe=MoEConfig(every=1, offset=0))
  mesh = {"data": 1, "fsdp": 1, "expert": 2, "tensor": 1}
  per_layer = wire_bound.exchange_bound(one, mesh)
  assert per_layer > 0
  for layers, every, offset, prefix in itertools.product(
    range(1, 8), range(1, 5), range(6), range(4)
  ):
    moe = MoEConfig(every=every, offset=offset, dense_prefix=prefix)
    config = Config(model=ModelConfig(num_layers=layers), moe=moe)
    is_moe = layer_pattern(layers, moe).is_moe
    indices = tuple(index for index, sparse in enumerate(is_moe) if sparse)
    assert indices == parameters.moe_layer_indices(config)
    assert wire_bound.exchange_bound(config, mesh) == len(indices) * per_layer


def test_vocabulary_without_data():
  """Bytes have 264 ids, bpe as many as configured, and the model's flag wins."""
  config = Config()
  assert parameters.resolve_vocab_size(config) == 264
  config.data.tokenizer = "bpe"
  assert parameters.resolve_vocab_size(config) == config.data.vocab_size
  config.model.vocab_size = 512
  assert parameters.resolve_vocab_size(config) == 512
