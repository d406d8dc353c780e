"""spec.json: what is written is read back, and changes are said in words."""

import copy
import functools
import importlib.util
import json
import sys

import pytest

from configs import default
from moejax.config import Config
from moejax.errors import UserError
from moejax.routing import registry
from moejax.run import provenance
from moejax.sweep.points import axes, stored
from moejax.sweep.points.expand import expand
from moejax.sweep.spec import SPEC_FILE, Spec


def is_small(config):
  return config.moe.num_experts < 32


def make(**changes) -> Spec:
  base = default.get_config()
  base.moe.num_selected = 2
  base.moe.options = {"top2": {"second_policy": "random"}}
  values: dict = {
    "base": base,
    "title": "Experts",
    "notes": "Experts.\n\nWhy they pay.",
    "axes": (
      axes.product("moe.router", "top2", "top_k"),
      axes.together({"moe.num_experts": [8, 32], "moe.capacity_factor": [1.25, None]}),
    ),
    "variants": {"wide": {"model.hidden": 512}, "as it is": {}},
    "conditions": (is_small,),
    "seeds": (0, 1),
    "match": "active_flops",
    "isoflop": (),
  }
  return Spec(**(values | changes))


def written(spec: Spec) -> dict:
  expansion = expand(spec)
  values = stored.to_json(spec, expansion.points, expansion.skipped)
  # As written, with sorted keys, and as read.
  return json.loads(json.dumps(values, sort_keys=True))


@functools.cache
def as_made_text() -> str:
  return json.dumps(written(make()))


def as_made() -> dict:
  """`written(make())`, made once."""
  return json.loads(as_made_text())


def test_a_specification_is_read_back():
  """All but its conditions, and every point with its config and its order."""
  spec = make()
  again, points = stored.from_json(as_made())
  expected = expand(spec).points
  assert points == expected and len(points) == 8
  assert [list(p.settings) for p in points] == [list(p.settings) for p in expected]
  for name in ("base", "title", "notes", "axes", "seeds", "match", "match_by", "isoflop"):
    assert getattr(again, name) == getattr(spec, name)
  assert list(again.variants.items()) == list(spec.variants.items())


def test_the_file_says_what_a_person_would_ask():
  """Source text of conditions, what each point changes in the base, and the code."""
  found = as_made()
  assert found["conditions"] == [
    "def is_small(config):\n  return config.moe.num_experts < 32"
  ]
  assert found["revision"] == provenance.revision()
  assert found["points"][1]["config"] == {
    "moe.router": "top2",
    "model.hidden": 512,
    "moe.hidden": 128,
    "moe.top2.second_policy": "random",
    "train.seed": 1,
  }


def test_a_condition_without_source_has_a_name():
  made = eval("lambda config: True")
  assert "lambda" in stored.source(made)


def test_nothing_changed_is_no_difference():
  """Prose and order of keys are no part of what a sweep is."""
  assert stored.differences(as_made(), written(make(title="x", notes="y"))) == []


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"seeds": (0, 1, 2)}, "seeds: 0, 1 before, 0, 1, 2 now"),
    ({"seeds": (0, 1, 2)}, "4 runs more: variant=wide,router=top2,num_experts=8,"),
    ({"seeds": (0,)}, "4 runs fewer: "),
    ({"conditions": ()}, "num_experts < 32 before, none now"),
    ({"match": ""}, "--match: active_flops before, none now"),
    ({"variants": {}}, "variants: as it is, wide before, none now"),
    (
      {"axes": (axes.product("moe.router", "top2"),)},
      "axis moe.num_experts with moe.capacity_factor is gone",
    ),
    (
      {"axes": (axes.product("moe.router", "top2"), *make().axes[1:])},
      "axis moe.router was top2, top_k and is top2",
    ),
  ],
)
def test_what_changed_is_said(changes, expected):
  """A resume that refuses names it."""
  found = stored.differences(as_made(), written(make(**changes)))
  assert any(expected in line for line in found), found
  assert all("\n" not in line for line in found)


def test_other_code_and_another_base_are_said():
  now = as_made()
  before: dict = copy.deepcopy(now) | {"revision": "0123456789abcdef+dirty"}
  before["base"]["moe.num_selected"] = 4
  del before["base"]["model.num_heads"]
  lines = stored.differences(before, now)
  assert lines[0].startswith("the code was at 0123456789+dirty and is at ")
  assert lines[1:] == [
    "--config.model.num_heads was at its default and is 2",
    "--config.moe.num_selected was 4 and is 2",
  ]


def test_a_file_of_something_else_differs():
  """JSON that was changed by hand is no bug of this program."""
  for other in ({"points": 3}, {"axes": [1]}, {"base": []}):
    assert stored.differences(other, as_made())


@pytest.mark.parametrize("damage", ["cut", "digest", "field", "format", "missing"])
def test_a_damaged_file_is_one_line(tmp_path, damage):
  """It names the file and the way out, whatever was done to it."""
  values = as_made()
  if damage == "digest":
    values["points"][3]["config"]["moe.hidden"] = 8
  if damage == "field":
    values["base"]["moe.num_expert"] = 8
  if damage == "format":
    values["format"] = 99
  if damage == "missing":
    del values["points"]
  text = json.dumps(values)
  file = tmp_path / SPEC_FILE
  file.write_text(text[: len(text) // 2] if damage == "cut" else text)
  with pytest.raises(UserError) as caught:
    stored.read(tmp_path)
  message = str(caught.value)
  assert str(file) in message and "Restore it" in message and "\n" not in message


def test_a_directory_without_a_sweep_is_one_line(tmp_path):
  with pytest.raises(UserError, match=f"holds no sweep .it has no {SPEC_FILE}"):
    stored.read(tmp_path)


OWN_ROUTER = """
import dataclasses
from moejax.routing import registry
from moejax.routing.token_choice import TopK

@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(TopK):
  name = "mine"

registry.ROUTERS["mine"] = Mine
"""


def test_a_router_of_ones_own_is_found_again(tmp_path, monkeypatch):
  """spec.json names its file; if that is gone, spec.json is not called damaged."""
  monkeypatch.setenv(registry.ENV, "")
  file = tmp_path / "mine.py"
  file.write_text(OWN_ROUTER)
  made = importlib.util.spec_from_file_location("tests_mine", file)
  assert made is not None and made.loader is not None
  module = importlib.util.module_from_spec(made)
  monkeypatch.setitem(sys.modules, "tests_mine", module)
  try:
    made.loader.exec_module(module)
    base = Config()
    base.moe.router = "mine"
    spec = Spec(base=base)
    values = stored.to_json(spec, expand(spec).points)
    assert values["routers"] == [str(file)]
    (tmp_path / SPEC_FILE).write_text(json.dumps(values))
    del registry.ROUTERS["mine"]  # As in a new process.
    _, (point,) = stored.read(tmp_path)
    assert point.config.moe.router == "mine" and "mine" in registry.ROUTERS
    del registry.ROUTERS["mine"]
    monkeypatch.setenv(registry.ENV, "")
    file.unlink()
    with pytest.raises(
      UserError, match=r"router from .*mine\.py, which no longer exists"
    ):
      stored.read(tmp_path)
    # Written before such files were stored.
    (tmp_path / SPEC_FILE).write_text(json.dumps(values | {"routers": []}))
    with pytest.raises(UserError) as caught:
      stored.read(tmp_path)
    assert "MOEJAX_ROUTERS=FILE" in str(caught.value)
    assert "move it away" not in str(caught.value)
  finally:
    if "mine" in registry.ROUTERS:
      del registry.ROUTERS["mine"]
