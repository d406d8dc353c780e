"""Counts of published encoder-decoders by hand, and FLOPs of both stacks."""

import copy

import pytest

from moejax.cli.flags import load_config
from moejax.config.check import validate
from moejax.cost.flops import flops_per_token, forward_flops_per_token
from moejax.cost.parameters import count_parameters, resolve_vocab_size


def by_hand(*, layers, width, heads, hidden, matrices, experts, sparse, embeddings):
  """T5's parts, with `layers` in each stack of which `sparse` are MoE.

  Attention is 4 matrices [width, heads * 64], once in an encoder layer and twice in a
  decoder layer; norms are 2 and 3 a layer and one at the end of each stack; a table of
  32 buckets per head and stack.
  """
  attention = 3 * layers * 4 * width * heads * 64
  feed_forward = matrices * width * hidden
  dense = 2 * (layers - sparse) * feed_forward
  routed = 2 * sparse * experts * (feed_forward + width)
  norms = (5 * layers + 2) * width
  return attention + dense + routed + norms + 2 * 32 * heads + embeddings * 32_128 * width


@pytest.mark.parametrize(
  ("name", "sizes", "published"),
  [
    ("switch_base_128", (12, 768, 12, 3072, 2, 128, 6, 1), 7_415_217_408),
    ("switch_large_128", (24, 1024, 16, 4096, 2, 128, 12, 1), 26.3e9),
    ("switch_xxl", (24, 4096, 64, 10_240, 3, 128, 12, 2), 395e9),
    ("switch_c", (15, 2080, 32, 6144, 2, 2048, 15, 1), 1.571e12),
  ],
)
def test_presets_have_the_published_counts(name, sizes, published):
  """To the digits that the paper gives, and to the last one by hand."""
  config = load_config(name)
  validate(config)
  found = count_parameters(config, resolve_vocab_size(config))[0]["total"]
  names = "layers width heads hidden matrices experts sparse embeddings"
  assert found == by_hand(**dict(zip(names.split(), sizes)))
  digits = 10 if isinstance(published, int) else len(f"{published:g}".split("e")[0]) - 1
  assert float(f"{found:.{digits - 1}e}") == pytest.approx(published, rel=1e-12)


def test_st_moe_has_its_published_count():
  """Of 24 layers in each stack 6 are sparse, with a dense feed-forward after each."""
  config = load_config("st_moe_32b")
  validate(config)
  found = count_parameters(config, resolve_vocab_size(config))[0]["total"]
  width, inner, one = 5120, 64 * 128, 3 * 5120 * 20_480
  attention = 3 * 24 * 4 * width * inner + 2 * 32 * 64
  feed_forward = 12 * 64 * one + 12 * 64 * width + 48 * one
  norms = (5 * 24 + 12 + 2) * width
  assert found == attention + feed_forward + norms + 2 * 32_128 * width
  assert float(f"{found:.3e}") == 269.1e9


def test_active_parameters_are_one_expert_of_each_layer():
  """All but 127 experts of each of 12 MoE layers in both stacks."""
  config = load_config("switch_base_128")
  total, active = count_parameters(config, resolve_vocab_size(config))
  assert total["total"] - active["total"] == 12 * 127 * 2 * 768 * 3072


def test_flops_of_a_row_by_hand():
  """Products of the default widths, per decoder token; training is three times that."""
  config = load_config("encoder_decoder_small")
  config = copy.deepcopy(config)
  config.model.num_layers, config.model.encoder_layers = 1, 2
  config.moe.every, config.moe.encoder_every, config.moe.offset = 1, 2, 1
  vocabulary = resolve_vocab_size(config)
  read, length = 128, 32
  square = 128 * 128
  dense = 2 * 128 * 256
  encoder = 2 * (4 * square + 2 * 128 * read) + dense + dense + 128 * 8
  decoder = (
    4 * square
    + 2 * 128 * length
    + dense
    + 128 * 8
    + 128 * config.model.padded(vocabulary)
  )
  cross = length * (2 * square + 2 * 128 * read) + read * 2 * square
  macs = read * encoder + length * decoder + cross
  found = forward_flops_per_token(config, vocabulary)["total"]
  assert found == pytest.approx(2 * macs / length)
  assert flops_per_token(config, vocabulary)["total"] == pytest.approx(3 * found)
