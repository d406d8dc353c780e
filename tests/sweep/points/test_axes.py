"""Axes from flags: values by type, one line for every mistake, names safe in a path."""

import re

import hypothesis
import pytest
from hypothesis import strategies as st

from moejax.config import text as config_text
from moejax.errors import ConfigError
from moejax.sweep.points import axes
from moejax.sweep.spec import Axis


def parse(*words: str) -> tuple[Axis, ...]:
  """Axes of flags written as on the command line, without the two hyphens."""
  given = []
  for word in words:
    name, _, text = word.partition("=")
    prefix, _, field = name.partition(".")
    given.append((prefix, field, text))
  return axes.parse(given)


def test_values_have_the_type_of_their_field():
  """Numbers, words, switches and `none`, as --config.FIELD takes them."""
  found = parse(
    "sweep.moe.num_experts=8, 16",
    "sweep.moe.capacity_factor=1,1.25,none",
    "sweep.moe.priority=arrival,gate",
    "sweep.model.qk_norm=true,false",
    "sweep.moe.top2.second_policy=all,random",
  )
  assert found == (
    axes.product("moe.num_experts", 8, 16),
    axes.product("moe.capacity_factor", 1.0, 1.25, None),
    axes.product("moe.priority", "arrival", "gate"),
    axes.product("model.qk_norm", True, False),
    axes.product("moe.top2.second_policy", "all", "random"),
  )


def test_all_zips_are_one_axis_at_the_place_of_the_first():
  """Axes keep the order of the line, and a zip pairs the values of its fields."""
  found = parse(
    "sweep.moe.jitter=0,0.1",
    "zip.moe.num_experts=8,16",
    "sweep.model.num_layers=2,4",
    "zip.moe.hidden=512,256",
  )
  assert found == (
    axes.product("moe.jitter", 0.0, 0.1),
    Axis(fields=("moe.num_experts", "moe.hidden"), values=((8, 512), (16, 256))),
    axes.product("model.num_layers", 2, 4),
  )


@pytest.mark.parametrize(
  ("line", "part"),
  [
    ("sweep.moe.num_expert=8", "Did you mean --sweep.moe.num_experts?"),
    ("zip.mo.num_experts=8", "--zip.mo.num_experts: there is no such field"),
    ("sweep.moe=8", "set one, for example --sweep.moe.num_experts."),
    ("sweep.moe.top2.second_polcy=all", "Did you mean --sweep.moe.top2.second_policy?"),
    ("sweep.moe.second_policy=all", "option of a router: --sweep.moe.top2.second_policy"),
    ("sweep.moe.num_experts=8,many", "--sweep.moe.num_experts=many: expected a whole"),
    ("sweep.moe.num_experts=8,none", "=none: expected a whole number."),
    ("sweep.moe.num_experts=", "--sweep.moe.num_experts=: the list is empty."),
    ("sweep.moe.num_experts=8,,16", "a value is missing between two commas"),
    ("sweep.moe.num_experts=8,0", "--sweep.moe.num_experts=0 must be at least 1"),
    ("sweep.moe.router=switch,tpo2", "--sweep.moe.router=tpo2 is unknown. Did you mean"),
    (
      "zip.moe.priority=gate,gaet",
      "--zip.moe.priority=gaet is unknown. Did you mean gate",
    ),
    ("sweep.moe.top2.second_policy=rndm", "second_policy=rndm is unknown. Did you mean"),
    (
      "zip.moe.num_experts=8,16 zip.moe.hidden=512",
      "--zip.moe.num_experts has 2 values and --zip.moe.hidden has 1: fields that vary",
    ),
    (
      "sweep.moe.num_experts=8 zip.moe.num_experts=16",
      "--zip.moe.num_experts: the field is varied by --sweep.moe.num_experts already",
    ),
    (
      "sweep.train.seed=1,2",
      "seeds are not an axis; use --seeds=N, or --seeds=0,1,5 for a list.",
    ),
    ("sweep.data.cache_dir=a,b", "may not vary within a sweep: it is a place for files"),
    ("sweep.schema_version=1,2", "it is not a setting."),
  ],
)
def test_a_mistake_is_one_line_with_the_flag_and_a_remedy(line, part):
  """Whatever is wrong: the name, a value, the list, or that the field varies at all."""
  with pytest.raises(ConfigError) as caught:
    parse(*line.split())
  assert part in str(caught.value) and "\n" not in str(caught.value)


def test_what_may_not_vary_are_fields():
  """A field that is renamed must be renamed in the table too."""
  assert set(axes.FIXED) <= set(config_text.field_types())


def test_a_name_is_short_unless_two_fields_end_alike():
  """`hidden` is a field of two sections; `seed` of one."""
  fields = ("moe.hidden", "model.hidden", "moe.capacity_factor", "train.seed")
  settings: dict[str, float] = dict(zip(fields, (512, 256, 1.25, 0)))
  name = axes.name_of(settings, fields)
  assert name == "moe.hidden=512,model.hidden=256,capacity_factor=1.25,seed=0"


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (None, "none"),
    (True, "true"),
    (1.0, "1"),
    (1e13, "1e13"),
    (3e-5, "3e-05"),
    (0.1234567, "0.1234567"),
    ("a b/c", "a_b_c"),
  ],
)
def test_values_in_a_name_are_exact_and_plain(value, text):
  """A float is written so that it reads back as itself."""
  assert axes.name_of({"moe.x": value}, ["moe.x"]) == f"x={text}"


def test_a_long_name_is_cut_and_stays_distinct():
  """What is cut off is told apart by a hash, and the seed stays readable."""
  fields = [f"section.a_long_field_{i}" for i in range(12)]
  one = dict.fromkeys(fields, 1) | {axes.SEED: 0}
  other = one | {fields[-1]: 2}
  names = [axes.name_of(s, [*fields, axes.SEED]) for s in (one, other)]
  again = axes.name_of(one | {axes.SEED: 7}, [*fields, axes.SEED])
  assert names[0] != names[1]
  assert all(len(name) == axes.NAME_LENGTH for name in names)
  assert again == names[0].removesuffix("0") + "7"


@hypothesis.given(
  st.lists(st.one_of(st.text(), st.floats(), st.integers(), st.booleans()), max_size=9)
)
def test_a_name_is_always_safe_in_a_path(values):
  """No separator, space or quote, whatever the values are."""
  settings = {f"moe.f{i}": value for i, value in enumerate(values)}
  name = axes.name_of(settings, settings)
  assert re.fullmatch(r"[A-Za-z0-9._=,~+-]*", name) and len(name) <= axes.NAME_LENGTH
