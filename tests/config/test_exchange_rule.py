"""The rule of `auto` for exchange and dispatcher, line by line of its docstring."""

from typing import Any

import pytest

from moejax.config.exchange_rule import CARRIES, choose
from moejax.errors import ConfigError

MESH: dict[str, Any] = dict(devices=4, token_shards=8, num_groups=8)


@pytest.mark.parametrize(
  ("platform", "capacity", "name"),
  [
    ("cpu", False, "grouped"),
    ("cpu", True, "grouped"),
    ("gpu", False, "grouped"),
    ("tpu", True, "gather"),
  ],
)
def test_dispatcher_auto_where_nothing_travels(platform, capacity, name):
  """Rows that exist on CPUs and dropless; static slots on accelerators."""
  got = choose("auto", "auto", num_selected=2, capacity=capacity, platform=platform)
  assert got == ("none", name)


@pytest.mark.parametrize(
  ("dispatcher", "capacity", "num_selected", "want"),
  [
    ("auto", True, 2, ("all_to_all", "gather")),
    ("gather", True, 2, ("all_to_all", "gather")),
    ("einsum", True, 2, ("all_to_all", "einsum")),
    ("grouped", True, 2, ("ragged", "grouped")),
    ("grouped", True, 4, ("ring", "grouped")),
    ("auto", False, 2, ("ragged", "grouped")),
    ("auto", False, 4, ("ring", "grouped")),
    ("grouped", False, 2, ("ragged", "grouped")),
    ("gather", False, 2, ("ring", "gather")),
    ("einsum", False, 2, ("ring", "einsum")),
  ],
)
def test_exchange_auto(dispatcher, capacity, num_selected, want):
  """Four expert devices: ring where a token visits nearly all of them."""
  kind = choose("auto", dispatcher, num_selected=num_selected, capacity=capacity, **MESH)
  assert kind == want


def test_groups_that_do_not_divide_fall_to_the_compiler():
  """Which takes dense weights alone; a named exchange is refused."""
  apart: dict[str, Any] = MESH | {"num_groups": 1}
  assert choose("auto", "auto", num_selected=2, capacity=True, **apart) == (
    "gspmd",
    "einsum",
  )
  with pytest.raises(
    ConfigError, match=r"exchange=auto .*\(by gspmd\).*dense weights.*patcher=auto\.$"
  ):
    choose("auto", "grouped", num_selected=2, capacity=True, **apart)
  with pytest.raises(ConfigError, match="1 routing groups do not divide evenly over 8"):
    choose("ring", "auto", num_selected=2, capacity=True, **apart)


@pytest.mark.parametrize(("flag", "place"), [("exchange", 0), ("dispatcher", 1)])
def test_an_unknown_name_is_refused_with_the_known_ones(flag, place):
  names = ["auto", "auto"]
  names[place] = "magic"
  with pytest.raises(ConfigError, match=f"{flag}=magic is unknown: use auto, "):
    choose(*names, num_selected=2, capacity=True)


def test_a_router_that_mixes_tokens_takes_dense_weights():
  """By every exchange of slots; dispatchers of whole tokens are refused by name."""
  mixes: dict[str, Any] = dict(num_selected=1, capacity=True, mixes=True)
  assert choose("auto", "auto", **mixes) == ("none", "einsum")
  assert choose("auto", "auto", **mixes, **MESH) == ("all_to_all", "einsum")
  for exchange in ("all_to_all", "ring", "gspmd"):
    assert choose(exchange, "auto", **mixes, **MESH) == (exchange, "einsum")
  for dispatcher in set(CARRIES["none"]) - {"einsum"}:
    with pytest.raises(ConfigError, match=f"dispatcher={dispatcher} moves whole tokens"):
      choose("auto", dispatcher, **mixes)
