"""moejax count: what it prints is what the plan computes."""

from moejax.cli import count as tool
from moejax.config import Config, MoEConfig
from moejax.cost import parameters


def test_parts_add_up_to_the_totals():
  """Every parameter and FLOP has a part; nothing is in two."""
  counted = tool.count(Config())
  for key in ("total", "active", "flops_per_token"):
    assert sum(part[key] for part in counted["parts"].values()) == counted[key]


def test_the_dense_twin_stands_beside_with_equal_feed_forward_flops():
  """Segments and shared experts included; only the router is on top."""
  moe = MoEConfig(num_selected=2, segments=2, num_shared=1, router="top_k")
  config = Config(moe=moe)
  ours, twin = tool.count(config), tool.count(parameters.dense_twin(config))
  assert tool.feed_forward_flops(ours) == tool.feed_forward_flops(twin)
  router = ours["parts"]["router"]["flops_per_token"]
  assert ours["flops_per_token"] - router == twin["flops_per_token"]


def test_causal_counts_less():
  """The triangle with its diagonal instead of the square: (S + 1) / 2S of it."""
  full = tool.count(Config())["parts"]["attention_scores"]["flops_per_token"]
  causal = tool.count(Config(), causal=True)
  length = Config().data.sequence_length
  assert causal["parts"]["attention_scores"]["flops_per_token"] == full * (length + 1) / (
    2 * length
  )
