"""Points: every combination once, each what a single run of its settings would be."""

import copy
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from configs import default
from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import UserError
from moejax.sweep.points import axes
from moejax.sweep.points.expand import digest, expand, points
from moejax.sweep.spec import Axis, Spec

EXPERTS = axes.product("moe.num_experts", 8, 16)
FACTORS = axes.product("moe.capacity_factor", 1.0, None)


def make(*on: Axis, **rest) -> Spec:
  values: dict = {"base": default.get_config(), "axes": on} | rest
  return Spec(**values)


def names(*on: Axis, **rest) -> list[str]:
  return [point.name for point in points(make(*on, **rest))]


def refused(*on: Axis, **rest) -> str:
  with pytest.raises(UserError) as caught:
    points(make(*on, **rest))
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_axes_are_multiplied_in_their_order_and_seeds_vary_fastest():
  assert names(EXPERTS, FACTORS, seeds=(0, 3)) == [
    f"num_experts={e},capacity_factor={c},seed={s}"
    for e in (8, 16)
    for c in (1, "none")
    for s in (0, 3)
  ]


def test_without_axes_there_is_the_base_config():
  (point,) = points(make())
  assert (point.name, point.config) == ("seed=0", default.get_config())


def test_a_point_is_the_config_of_a_single_run():
  """The base, its settings and its seed, and nothing else; the base stays as it was."""
  base = default.get_config()
  point = points(make(EXPERTS, FACTORS, base=base, seeds=(0, 1)))[-1]
  expected = default.get_config()
  expected.moe.num_experts, expected.moe.capacity_factor = 16, None
  expected.train.seed = 1
  assert point.config == expected and base == default.get_config()
  assert list(point.settings.items()) == [
    ("moe.num_experts", 16),
    ("moe.capacity_factor", None),
    ("train.seed", 1),
  ]
  assert point.directory == f"{point.name}-{digest(expected)}"


@hypothesis.settings(deadline=None, max_examples=12)
@hypothesis.given(
  experts=st.lists(st.integers(1, 64), min_size=1, max_size=2, unique=True),
  factors=st.lists(st.floats(0.5, 4), min_size=1, max_size=3, unique=True),
  zipped=st.lists(
    st.tuples(st.integers(1, 9), st.floats(0, 0.5)), min_size=1, max_size=3, unique=True
  ),
  seeds=st.sets(st.integers(0, 99), min_size=1, max_size=3),
)
def test_there_are_as_many_points_as_the_product(experts, factors, zipped, seeds):
  """Each with a name, a digest and so a directory of its own."""
  pairs = Axis(fields=("model.num_layers", "moe.jitter"), values=tuple(zipped))
  hypothesis.assume(all(layers > 1 for layers, _ in zipped))
  found = points(
    make(
      axes.product("moe.num_experts", *experts),
      pairs,
      axes.product("moe.capacity_factor", *factors),
      seeds=tuple(seeds),
    )
  )
  sizes = (experts, factors, zipped, seeds)
  assert len(found) == math.prod(map(len, sizes))
  assert len({p.digest for p in found}) == len({p.name for p in found}) == len(found)


ROUTERS = axes.product("moe.router", "top_k", "top2")
POLICIES = axes.product("moe.top2.second_policy", "random", "all")


@pytest.mark.parametrize("first", [True, False])
def test_an_option_of_a_router_multiplies_only_its_points(first):
  """Wherever its axis stands, points of other routers are there once."""
  base = default.get_config()
  base.moe.num_selected = 2
  on = (POLICIES, ROUTERS) if first else (ROUTERS, POLICIES)
  found = points(make(*on, base=base))
  options = [(p.config.moe.router, p.config.moe.options) for p in found]
  assert sorted(options, key=str) == [
    ("top2", {"top2": {"second_policy": "random"}}),
    ("top2", {}),
    ("top_k", {}),
  ]
  assert sum("second_policy" in point.name for point in found) == 2


def test_an_option_in_a_zip_is_set_where_its_router_is():
  base = default.get_config()
  base.moe.num_selected = 2
  pair = axes.together(
    {"moe.router": ["top_k", "top2"], "moe.top2.second_policy": ["all", "random"]}
  )
  found = points(make(pair, base=base))
  assert [list(p.settings) for p in found] == [
    ["moe.router", "train.seed"],
    ["moe.router", "moe.top2.second_policy", "train.seed"],
  ]


def test_an_option_of_a_router_that_no_point_has_is_refused():
  """On an axis and in the base config, where it would be lost without a word."""
  text = refused(POLICIES)
  assert "--sweep.moe.top2.second_policy: no point has --config.moe.router=top2" in text
  base = default.get_config()
  base.moe.options = {"top2": {"second_policy": "random"}}
  text = refused(EXPERTS, base=base)
  assert "--config.moe.top2.second_policy: no point has --config.moe.router=top2" in text


def test_an_option_of_the_base_config_applies_to_the_points_of_its_router():
  base = default.get_config()
  base.moe.num_selected = 2
  base.moe.options = {"top2": {"second_policy": "random"}}
  found = points(make(ROUTERS, base=base))
  assert [p.config.moe.options for p in found] == [{}, base.moe.options]


TOO_MANY = axes.product("moe.num_selected", 2, 4, 16)
TOP_K = axes.product("moe.router", "top_k")


def test_an_impossible_point_is_named():
  """With the reason that a single run would give."""
  text = refused(TOP_K, EXPERTS, TOO_MANY)
  assert text.startswith("point router=top_k,num_experts=8,num_selected=16: --config.moe")
  assert "more than --config.moe.num_experts=8" in text and "--skip_impossible" in text


def test_a_field_that_a_router_does_not_read_makes_a_point_impossible():
  """As for a single run: it would be the same run under another name."""
  hashed = axes.product("moe.router", "switch", "hash")
  text = refused(hashed, axes.product("moe.jitter", 0.0, 0.1))
  assert "router=hash,jitter" in text and "this router does not read it" in text


@pytest.mark.parametrize("told", [False, True])
def test_a_point_that_its_devices_cannot_run_is_impossible(told):
  """By the mesh alone, if it has no free axis, or by the number of devices."""
  base = default.get_config()
  base.mesh.expert, base.moe.group_size = 4, 256
  base.mesh.data = -1 if told else 2
  on = (axes.product("moe.exchange", "ragged"), axes.product("moe.dispatcher", "einsum"))
  spec = make(*on, base=base)
  with pytest.raises(UserError, match="sends sorted rows, but einsum has slots"):
    expand(spec, 8 if told else None)
  if told:
    assert len(expand(spec).points) == 1


def test_impossible_points_can_be_left_out():
  """Each is listed with its reason; the others are there."""
  expansion = expand(make(TOP_K, EXPERTS, TOO_MANY, skip_impossible=True))
  assert [point.name for point in expansion.skipped] == [
    "router=top_k,num_experts=8,num_selected=16"
  ]
  assert "cannot choose an expert twice" in expansion.skipped[0].reason
  assert len(expansion.points) == 5
  only = axes.product("moe.num_selected", 99)
  assert "every one of them is impossible" in refused(TOP_K, only, skip_impossible=True)


def test_conditions_choose_points():
  """They see the config; what they leave out need not be possible."""

  def fits(config: Config) -> bool:
    return config.moe.num_selected <= config.moe.num_experts

  assert len(points(make(TOP_K, EXPERTS, TOO_MANY, conditions=(fits,)))) == 5
  assert "the conditions leave none" in refused(EXPERTS, conditions=(lambda c: False,))


def test_a_condition_sees_the_seed():
  """One seed for all points, further seeds for one of them."""

  def wanted(config: Config) -> bool:
    return config.train.seed == 0 or config.moe.num_experts == 8

  found = points(make(EXPERTS, seeds=(0, 1), conditions=(wanted,)))
  kept = [(p.config.moe.num_experts, p.config.train.seed) for p in found]
  assert kept == [(8, 0), (8, 1), (16, 0)]


def test_each_seed_can_have_its_own_start():
  """`{seed}` in the directory that runs start from, so that both have one seed."""
  starts = axes.product("train.init_from", "starts/{seed}", "one")
  found = points(make(starts, seeds=(0, 3)))
  assert [p.config.train.init_from for p in found] == [
    "starts/0",
    "starts/3",
    *["one"] * 2,
  ]
  assert len({p.digest for p in found}) == 4


def test_conditions_may_leave_none():
  assert "the conditions leave none" in refused(EXPERTS, conditions=(lambda c: False,))


def test_a_condition_that_fails_names_the_point():
  text = refused(EXPERTS, conditions=(lambda c: c.moe.nothing,))
  assert "a condition fails at point num_experts=8,seed=0: AttributeError" in text


def test_variants_are_an_axis_by_their_names():
  variants = {"dense twin": {"moe.dense_twin": True}, "switch": {}}
  found = points(make(EXPERTS, variants=variants))
  assert [p.name for p in found][:3] == [
    "variant=dense_twin,num_experts=8,seed=0",
    "variant=dense_twin,num_experts=16,seed=0",
    "variant=switch,num_experts=8,seed=0",
  ]
  assert [p.config.moe.dense_twin for p in found] == [True, True, False, False]
  assert found[0].settings["variant"] == "dense twin"


@pytest.mark.parametrize(
  ("on", "rest", "part"),
  [
    ((axes.product("moe.num_experts", 8, 8),), {}, "the same point twice: num_experts=8"),
    ((axes.product("moe.num_experts"),), {}, "the axis moe.num_experts has no values"),
    ((axes.product("moe.num_expert", 8),), {}, "Did you mean --sweep.moe.num_experts?"),
    ((axes.product("moe.num_experts", "8"),), {}, "num_experts='8': expected a whole"),
    ((axes.product("train.seed", 8),), {}, "use --seeds=N"),
    ((EXPERTS, EXPERTS), {}, "--sweep.moe.num_experts: two axes vary this field"),
    (
      (Axis(fields=("moe.num_experts", "moe.hidden"), values=((8,),)),),
      {},
      "has 2 fields, and one of its positions 1 values",
    ),
    ((), {"variants": {"a": {"moe.num_expert": 8}}}, "Did you mean"),
    (
      (),
      {"variants": {"a": {"train.seed": 8}}},
      "variant 'a', train.seed: this field may",
    ),
    (
      (EXPERTS,),
      {"variants": {"a": {"moe.num_experts": 8}}},
      "an axis varies this field",
    ),
    (
      (),
      {"variants": {"a": {}, "b": {}}},
      "twice: variant=a,seed=0 and variant=b,seed=0",
    ),
    ((), {"seeds": ()}, "--seeds: no seed is given"),
    ((), {"seeds": (-1,)}, "--seeds=-1 must be at least 0"),
    ((), {"seeds": (1, 1)}, "seeds 1, 1: one of them is given twice"),
    (
      (axes.product("moe.hidden", *range(1, 101)),),
      {"seeds": range(1001)},
      "100,000 points",
    ),
  ],
)
def test_a_wrong_specification_is_one_line(on, rest, part):
  """As a spec file, unlike flags, can hold anything."""
  if "seeds" in rest:
    rest["seeds"] = tuple(rest["seeds"])
  assert part in refused(*on, **rest)


def test_names_that_look_alike_are_told_apart():
  """Two texts with one safe form still have two names."""
  found = names(axes.product("data.text_field", "a/b", "a_b"))
  assert len(set(found)) == 2 and all(
    n.startswith("text_field=a_b,seed=0~") for n in found
  )


def test_the_digest_is_of_what_a_run_computes():
  """Another machine's paths do not count; every setting does."""
  config = default.get_config()
  elsewhere = copy.deepcopy(config)
  elsewhere.data.cache_dir, elsewhere.data.num_workers = "/data", 4
  assert digest(elsewhere) == digest(config)
  changed = copy.deepcopy(config)
  config_text.set_field(changed, "moe.router", "hash")
  options = copy.deepcopy(changed)
  config_text.set_field(options, "moe.hash.spread", "balanced")
  assert len({digest(c) for c in (config, changed, options)}) == 3


def test_the_digest_of_a_config_never_changes():
  """Directories of earlier sweeps are found by it, so it is a promise."""
  config = Config()
  assert digest(config) == "44136fa3"  # The first of SHA-256 of "{}".
  config.moe.num_experts, config.moe.capacity_factor = 16, None
  assert digest(config) == "2a03851a"
