"""Budgets: met within 1% by a count from the model's own shapes, or refused."""

import copy
import itertools
import math
import re

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from configs import default
from moejax.config import Config
from moejax.config import text as config_text
from moejax.cost.parameters import resolve_vocab_size
from moejax.errors import ConfigError
from moejax.models.decoder import Decoder
from moejax.sweep.points import axes, budget
from moejax.sweep.points.expand import points
from moejax.sweep.spec import Spec


def counted(config: Config) -> float:
  """Training FLOPs per token from a list of the shapes of all matrices.

  Every matrix is one multiply-accumulate per entry and token, 2 FLOPs forward and 4
  backward; of the experts' entries, K/E. The tied table is the output head. Scores and
  weighted sum of attention are 4*S*H*head_dim forward per layer. For configs like the
  default: gelu, tied, no shared experts.
  """
  model, moe = config.model, config.moe
  width, head_dim = model.width, model.width // model.num_heads
  keys = (model.num_kv_heads or model.num_heads) * head_dim
  attention = [(width, width), (width, keys), (width, keys), (width, width)]
  dense = [(width, model.hidden), (model.hidden, width)]
  expert = [(width, moe.hidden // moe.segments), (moe.hidden // moe.segments, width)]
  chosen = expert * (moe.num_selected * moe.segments)
  sparse = [*chosen, (width, moe.num_experts * moe.segments)]
  shapes = [(width, resolve_vocab_size(config))]
  for layer in range(model.num_layers):
    is_sparse = layer >= moe.dense_prefix and (
      (layer - moe.dense_prefix) % moe.every == moe.offset % moe.every
    )
    shapes += attention + (sparse if is_sparse else dense)
  scores = 4 * config.data.sequence_length * width * model.num_layers
  return 6 * sum(rows * columns for rows, columns in shapes) + 3 * scores


def make(**changes) -> Spec:
  values: dict = {"base": default.get_config()} | changes
  return Spec(**values)


def refused(spec: Spec) -> str:
  with pytest.raises(ConfigError) as caught:
    points(spec)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_the_count_by_shapes_is_of_the_model():
  """The shapes are those of its arrays, of which a token uses K/E of the experts'."""
  config = default.get_config()
  config.moe.segments, config.moe.router = 2, "top_k"
  vocab_size = resolve_vocab_size(config)
  model = Decoder(config.model, config.moe, vocab_size=vocab_size)
  used = 0.0
  for path, leaf in jax.tree_util.tree_leaves_with_path(model.shapes()):
    name = jax.tree_util.keystr(path)
    share = 1 / 8 if "experts" in name else 0 if "scale" in name else 1
    used += math.prod(leaf.shape) * share
  scores = 3 * 4 * 128 * 128 * 4
  assert counted(config) == 6 * used + scores == budget.token_flops(config)


@hypothesis.settings(deadline=None, max_examples=12)
@hypothesis.given(
  experts=st.integers(1, 40), segments=st.sampled_from([1, 2, 4, 8]), width=st.booleans()
)
def test_matched_points_cost_what_the_base_costs(experts, segments, width):
  """Within 1%, whatever router cost the axes bring; experts stay divisible."""
  base = default.get_config()
  base.moe.router = "top_k"
  extra = (axes.product("model.hidden", 200),) if width else ()
  (point,) = points(
    make(
      base=base,
      axes=(
        axes.product("moe.num_experts", experts),
        axes.product("moe.segments", segments),
        *extra,
      ),
      match="active_flops",
    )
  )
  assert counted(point.config) == pytest.approx(counted(base), rel=0.01)
  assert point.config.moe.hidden % segments == 0


def test_a_point_within_one_per_cent_is_left_alone():
  """Sixteen experts add 0.26% by their router: no reason to change a width."""
  found = points(
    make(axes=(axes.product("moe.num_experts", 8, 16, 128),), match="active_flops")
  )
  assert [p.config.moe.hidden for p in found] == [256, 256, 196]
  assert found[0].config == make().base


def test_another_field_can_be_solved():
  """Its own rules hold: a width of whole, even heads."""
  base = default.get_config()
  base.model.num_heads = 1
  (point,) = points(
    make(
      base=base,
      axes=(axes.product("model.num_layers", 8),),
      match="active_flops",
      match_by="model.width",
    )
  )
  assert counted(point.config) == pytest.approx(counted(base), rel=0.01)
  assert point.config.model.width % 2 == 0 and point.config.moe.hidden == 256


def test_the_solution_is_the_nearest_one():
  """No other width comes closer to the target."""
  config, reference = default.get_config(), default.get_config()
  config.moe.num_experts = 128
  budget.match(config, reference, "moe.hidden")
  distances = {}
  for hidden in range(1, 400):
    config.moe.hidden = hidden
    distances[hidden] = abs(counted(config) - counted(reference))
  assert min(distances, key=lambda hidden: distances[hidden]) == 196


@pytest.mark.parametrize(
  ("field", "values", "match_by", "part"),
  [
    (
      "moe.num_experts",
      (4096,),
      "moe.hidden",
      "point num_experts=4096: --match=active_flops: no --config.moe.hidden brings FLOPs "
      "per token within 1% of the base config's 4,730,880. The nearest reachable is 1, "
      "with 10,",
    ),
    ("moe.num_experts", (64,), "train.num_steps", "do not grow with it"),
    # Within 1% as it is: nothing would be solved, and the flag would say nothing.
    ("moe.num_experts", (8,), "train.num_steps", "do not grow with it"),
    ("moe.num_experts", (64,), "moe.every", "do not grow with it"),
    ("moe.num_experts", (64,), "moe.hiden", "Did you mean moe.hidden?"),
    (
      "moe.num_experts",
      (64,),
      "moe.jitter",
      "--match_by=moe.jitter: not a field that can be",
    ),
    ("moe.hidden", (64, 512), "moe.hidden", "--match=active_flops solves this field"),
  ],
)
def test_what_cannot_be_matched_is_refused(field, values, match_by, part):
  """Out of reach, no size, or varied at the same time."""
  on = (axes.product(field, *values),)
  assert part in refused(make(axes=on, match="active_flops", match_by=match_by))


def test_an_unknown_match_is_refused():
  assert "Did you mean active_flops?" in refused(make(match="active-flop"))


def test_budgets_are_spent_within_one_per_cent():
  """Each budget on 5 to 7 sizes around the base, for every other axis."""
  spec = make(axes=(axes.product("moe.num_experts", 8, 32),), isoflop=(1e13, 3e13, 1e14))
  found = points(spec)
  for flops in spec.isoflop:
    for experts in (8, 32):
      curve = [
        p.config
        for p in found
        if p.settings["isoflop"] == flops and p.config.moe.num_experts == experts
      ]
      assert 5 <= len(curve) <= 7
      for config in curve:
        tokens = config.train.num_steps * config.train.batch_size * 128
        assert counted(config) * tokens == pytest.approx(flops, rel=0.01)
        assert config.model.width // config.model.num_heads == 64
        assert config.moe.hidden == config.model.hidden == 2 * config.model.width
      costs = [counted(config) for config in curve]
      assert all(b > 1.25 * a for a, b in itertools.pairwise(costs))
  assert found[0].name == "num_experts=8,isoflop=1e13,width=64,num_layers=2,seed=0"


@hypothesis.settings(deadline=None, max_examples=6)
@hypothesis.given(
  width=st.sampled_from([64, 96, 256, 768]),
  heads=st.sampled_from([1, 2, 4, 8]),
  groups=st.booleans(),
  layers=st.integers(1, 13),
  every=st.sampled_from([1, 2, 3]),
  prefix=st.integers(0, 2),
  segments=st.sampled_from([1, 4]),
  steps=st.integers(300, 3000),
)
def test_every_base_has_a_ladder_of_valid_sizes(
  width, heads, groups, layers, every, prefix, segments, steps
):
  """Heads and groups of heads keep their sizes; all points pass a single run's checks."""
  base = default.get_config()
  base.model.width, base.model.num_heads, base.model.num_layers = width, heads, layers
  base.model.num_kv_heads = heads // 2 if groups and heads > 1 else 0
  base.moe.every, base.moe.dense_prefix, base.moe.segments = every, prefix, segments
  base.moe.router = "top_k"
  hypothesis.assume(prefix + (1 % every) < layers)
  base.train.num_steps = steps
  flops = budget.training_flops(base) * 20
  found = points(make(base=base, isoflop=(flops,)))
  assert 5 <= len(found) <= 7
  for point in found:
    model = point.config.model
    assert budget.is_within(budget.training_flops(point.config), flops)
    assert model.width * heads == width * model.num_heads
    assert not groups or heads == 1 or model.num_heads == 2 * model.num_kv_heads


def test_an_encoder_decoder_spends_the_tokens_of_its_decoder():
  """16 rows of 32 decoder tokens are 512 tokens a step, whatever the encoder reads."""
  base = default.get_config()
  base.model.kind, base.data.objective = "encoder_decoder", "span_corruption"
  base.train.batch_size, base.data.decoder_length = 16, 32
  base.model.encoder_layers = 2
  found = points(
    make(base=base, axes=(axes.product("model.width", 64, 128),), isoflop=(1e13,))
  )
  for point in found:
    config = point.config
    assert budget.num_tokens(config) == config.train.num_steps * 512
    spent = config.train.num_steps * 512 * budget.token_flops(config)
    assert spent == pytest.approx(1e13, rel=0.01)


def test_with_sizes_of_ones_own_each_point_keeps_its_shape():
  """Only the number of steps is solved."""
  sizes = axes.together({"model.width": [64, 128], "model.num_layers": [4, 2]})
  found = points(make(axes=(sizes,), isoflop=(1e12,)))
  assert len(found) == 2
  for point in found:
    assert budget.is_within(budget.training_flops(point.config), 1e12)
    expected = copy.deepcopy(make().base)
    for field in ("model.width", "model.num_layers", "train.num_steps"):
      config_text.set_field(expected, field, config_text.get_field(point.config, field))
    assert point.config == expected


def test_a_rung_is_matched_to_the_base_of_its_size():
  """Otherwise every size would be made as narrow as needed to cost what the base does."""
  found = points(
    make(
      axes=(axes.product("moe.num_experts", 64),), match="active_flops", isoflop=(3e13,)
    )
  )
  assert len({round(counted(p.config), -5) for p in found}) == len(found)
  for point in found:
    same = copy.deepcopy(point.config)
    same.moe.num_experts, same.moe.hidden = 8, 2 * same.model.width
    assert counted(point.config) == pytest.approx(counted(same), rel=0.01)


@pytest.mark.parametrize("flops", [1e9, 1e99])
def test_the_nearest_budget_that_a_refusal_names_is_accepted(flops):
  """On either side: too small for five sizes, or for the steps that a run may take."""
  words = refused(make(isoflop=(flops,)))
  near = re.findall(r"nearest reachable budget is (\S+) FLOPs", words)
  assert len(near) == 1 and len(budget.ladder(default.get_config(), float(near[0]))) >= 5


@pytest.mark.parametrize(
  ("changes", "part"),
  [
    (
      {"isoflop": (1e9,)},
      "a curve needs 5. The nearest reachable budget is 1.4e+12 FLOPs",
    ),
    ({"isoflop": (1e99,)}, "0 of the sizes around the base config can spend it"),
    ({"isoflop": (0.0,)}, "--isoflop=0: a budget is a number of FLOPs above 0"),
    ({"isoflop": (math.nan,)}, "--isoflop=nan: a budget"),
    ({"isoflop": (-1e13,)}, "--isoflop=-1e13: a budget"),
    (
      {"isoflop": (1e99,), "axes": (axes.product("model.width", 128),)},
      "Give a smaller budget, a larger model",
    ),
    ({"isoflop": (1e13, 1e13)}, "the same point twice: isoflop=1e13"),
    (
      {"isoflop": (1.45e10,), "axes": (axes.product("model.width", 128),)},
      "no number of steps spends it within 1%. The nearest reachable budget is 9.689e+09 "
      "FLOPs, with --config.train.num_steps=1.",
    ),
    (
      {"isoflop": (1e13,), "axes": (axes.product("train.num_steps", 9),)},
      "--sweep.train.num_steps: --isoflop solves this field",
    ),
    (
      {"isoflop": (1e13,), "axes": (axes.product("moe.hidden", 64, 128),)},
      "--sweep.moe.hidden: --isoflop makes a ladder of sizes, which sets this field",
    ),
  ],
)
def test_a_budget_that_cannot_be_met_is_refused(changes, part):
  """With the nearest one that can."""
  assert part in refused(make(**changes))


def test_the_nearest_reachable_budget_can_be_reached():
  """The remedy in the message works."""
  text = refused(make(isoflop=(1e9,)))
  nearest = float(text.partition("budget is ")[2].partition(" FLOPs")[0])
  assert len(points(make(isoflop=(nearest,)))) >= 5
