"""Shipped configs of published models: counted exactly, and the models they say."""

import copy
import math

import jax
import pytest

from moejax.cli import flags as cli
from moejax.cli.listing import shipped_configs
from moejax.config import Config, MeshConfig
from moejax.config.check import validate
from moejax.cost import parameters
from moejax.data.tokenizer import ByteTokenizer
from moejax.evaluate import generation
from moejax.interop import architecture as architectures
from moejax.interop.canonical import differences
from moejax.interop.published import read_config
from moejax.models.decoder import Decoder
from moejax.sharding.rules import RULES
from tests.interop.config_json import CONFIG_JSON
from tests.interop.presets import PRESETS
from tests.train.conftest import make_batch, make_setup

LENGTH = 16
ALL = sorted(PRESETS)


def load(name: str) -> Config:
  return cli.load_config(str(shipped_configs()[name]))


def test_every_shipped_config_is_in_the_table():
  """A new preset needs a source; only the default, which is ours, has none.

  Encoder-decoders have theirs in tests/cost/test_encoder_decoder.py.
  """
  decoders = {n for n in shipped_configs() if load(n).model.kind == "decoder"}
  assert decoders == set(PRESETS) | {"default"}


@pytest.mark.parametrize("name", ALL)
def test_counts_are_those_of_the_source(name):
  """By the sum over published tensor sizes, to the last parameter, and the published
  figures; active ones by the convention that the maker uses."""
  config, source = load(name), PRESETS[name]
  validate(config)
  vocab = parameters.resolve_vocab_size(config)
  total, active = parameters.count_parameters(config, vocab)
  assert total["total"] == source.total == source.count(source.experts)
  assert active["total"] == source.count(source.selected)
  if source.active is not None:
    assert active["total"] == source.active
  if source.billions is not None:
    figure, convention = source.billions
    parts = {"all": (), "no embedding": ("embedding",)}
    parts["no vocabulary"] = ("embedding", "head")
    left_out = sum(active[part] for part in parts[convention])
    digits = len(str(figure).partition(".")[2])
    assert round((active["total"] - left_out) / 1e9, digits) == figure


def test_deepseek_v3_without_its_biases_of_choice():
  """58 layers of 256 numbers that the optimizer does not train."""
  assert PRESETS["deepseek_v3"].total - 58 * 256 == 671_026_404_352


@pytest.mark.parametrize("name", ALL)
def test_the_parameter_tree_has_the_counted_total(name):
  """Of the model itself, as shapes: nothing is allocated."""
  config = load(name)
  model = Decoder(
    config.model, config.moe, vocab_size=parameters.resolve_vocab_size(config)
  )
  leaves = jax.tree.leaves(model.shapes())
  assert sum(math.prod(leaf.shape) for leaf in leaves) == PRESETS[name].total


@pytest.mark.parametrize("name", ALL)
def test_every_large_matrix_is_cut_over_fsdp(name):
  """A layer's matrix of more than 2^20 numbers that each device held in full would decide
  what fits: DeepSeek-V3's up-projections alone would take 40 GB with their moments."""
  config = load(name)
  model = Decoder(
    config.model, config.moe, vocab_size=parameters.resolve_vocab_size(config)
  )
  axes = jax.tree.leaves(model.logical_axes(), is_leaf=lambda a: isinstance(a, tuple))
  for names, leaf in zip(axes, jax.tree.leaves(model.shapes()), strict=True):
    sizes = [n for n, axis in zip(leaf.shape, names, strict=True) if axis != "layer"]
    if math.prod(sizes) > 2**20:
      assert "fsdp" in RULES.spec(names), (names, leaf.shape)


@pytest.mark.parametrize("name", sorted(CONFIG_JSON))
def test_a_preset_is_the_model_of_its_config_json(name):
  """Nothing that logits depend on differs from what the converter reads; nor does the
  context."""
  values, ours = CONFIG_JSON[name], load(name)
  architecture = architectures.get(values["model_type"], name)
  read = read_config(architecture, values, name)
  assert differences(ours, read) == []
  context = ours.model.max_position or ours.data.sequence_length
  assert context == read.model.max_position


def shrunken(config: Config) -> Config:
  """The same options with tiny sizes, on one device."""
  config = copy.deepcopy(config)
  model, moe = config.model, config.moe
  grouped = model.num_kv_heads not in (0, model.num_heads)
  model.width, model.num_heads, model.hidden = 32, 4, 48
  model.num_kv_heads = 2 if grouped else 0
  model.head_dim = 12 if model.head_dim else 0
  if model.attention == "latent":
    model.q_rank = 20 if model.q_rank else 0
    model.kv_rank, model.nope_head_dim = 16, 8
    model.rope_head_dim, model.value_head_dim = 4, 6
  model.sliding_window = 5 if model.sliding_window else 0
  moe.dense_prefix = min(moe.dense_prefix, 1)
  model.num_layers = moe.dense_prefix + max(2, moe.every)
  model.vocab_size, model.max_position = 264, 0
  # jax's attention on CPU has no gradients in bfloat16 under strict promotion.
  model.dtype, model.remat = "float32", "none"
  moe.num_experts, moe.num_selected = 8, min(moe.num_selected, 3)
  moe.hidden, moe.shared_hidden = 24, 40 if moe.shared_hidden else 0
  if "num_expert_groups" in moe.router_options:
    moe.router_options.update(num_expert_groups=4, num_selected_groups=2)
  moe.group_size, moe.exchange_chunks = 0, 1
  config.data.tokenizer, config.data.sequence_length = "bytes", LENGTH
  config.train.batch_size, config.mesh = 2, MeshConfig(data=1)
  config.optimizer.warmup_steps = 1
  return config


FAST = ("deepseek_v3", "gpt_oss_20b")
"""Between them most options that a preset uses."""


@pytest.mark.parametrize(
  "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ALL]
)
def test_a_small_copy_trains_a_step_and_generates(name):
  """Every option of a preset works with every other one, in both directions."""
  config = shrunken(load(name))
  validate(config)
  setup = make_setup(config)
  state, metrics = setup.run(setup.state(), make_batch(0, 2, LENGTH))
  # Of 264 ids at random: ln 264 = 5.6.
  sums = metrics[0].sums
  assert 5 < sums.loss / sums.tokens < 7 and metrics[0].grad_norm > 0
  made = generation.generate(
    setup.model,
    state["params"],
    ByteTokenizer(),
    ["ab"],
    max_length=LENGTH,
    max_tokens=3,
  )
  assert made.num_tokens > 0
