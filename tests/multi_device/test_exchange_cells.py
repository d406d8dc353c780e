"""Dispatcher x exchange is a product: each cell of docs/sharding.md runs, or is refused.

A refusal comes before anything is compiled, from the check of the config, and from the
layer itself; it names both flags and what would run.
"""

import itertools
import pathlib
import re

import numpy as np
import pytest

from moejax.config import Config
from moejax.config.devices import validate_devices
from moejax.config.exchange_rule import CARRIES
from moejax.dispatch.registry import DISPATCHERS
from moejax.errors import ConfigError
from tests.multi_device import test_expert_parallel as layer

MESH = "expert 4 x data 2"
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "sharding.md"


def table() -> dict[tuple[str, str], str]:
  """What the page says of each (dispatcher, exchange)."""
  lines = PAGE.read_text(encoding="utf-8").splitlines()
  head = next(line for line in lines if line.startswith("| dispatcher |"))
  exchanges = re.findall(r"`(\w+)`", head)
  cells = {}
  for name in DISPATCHERS:
    row = next(line for line in lines if line.startswith(f"| `{name}`"))
    for exchange, cell in zip(exchanges, row.strip("| ").split("|")[2:], strict=True):
      cells[name, exchange] = cell.strip()
  return cells


def config_of(dispatcher: str, exchange: str, factor: float | None) -> Config:
  config = Config(mesh=layer.MESHES[MESH])
  config.moe.dispatcher, config.moe.exchange = dispatcher, exchange
  config.moe.capacity_factor = factor
  return config


def test_the_page_has_every_cell():
  """And says "yes" where the rule carries the dispatcher, on a mesh or off it."""
  cells = table()
  assert set(cells) == set(itertools.product(DISPATCHERS, CARRIES))
  for (dispatcher, exchange), cell in cells.items():
    assert cell.startswith("yes") == (dispatcher in CARRIES[exchange]), (dispatcher, cell)


@pytest.mark.parametrize(
  ("dispatcher", "exchange", "factor"),
  [
    # `grouped` is for dropless layers, the others for a capacity: the rest is slow.
    pytest.param(d, x, f, marks=[pytest.mark.slow] * ((f is None) != (d == "grouped")))
    for (d, x), cell in table().items()
    for f in (1.0, None)
    if cell.startswith("yes") and x != "none" and (f or "capacity" not in cell)
  ],
)
def test_a_cell_that_runs_gives_the_numbers_of_one_device(dispatcher, exchange, factor):
  """Values and gradients, with drops and dropless."""
  validate_devices(config_of(dispatcher, exchange, factor), 8)
  layer.check("top2", factor, MESH, exchange=exchange, dispatcher=dispatcher)


@pytest.mark.parametrize(
  ("dispatcher", "exchange"),
  [(d, x) for (d, x), cell in table().items() if not cell.startswith("yes")],
)
def test_a_cell_that_does_not_run_is_refused(dispatcher, exchange):
  """By both flags, and every way out that is named does run."""
  with pytest.raises(ConfigError) as error:
    validate_devices(config_of(dispatcher, exchange, 1.0), 8)
  text = str(error.value)
  assert f"dispatcher={dispatcher} does not run with" in text
  assert f"exchange={exchange} on this mesh" in text
  with pytest.raises(ConfigError, match=f"dispatcher={dispatcher} does not run"):
    shell = layer.make("top2", 1.0, dispatcher=dispatcher, exchange=exchange)
    layer.compute(shell, 1.0, layer.MESHES[MESH], 8)
  ways = re.search(r"Use --config.moe.dispatcher=auto or .*exchange=(.*)\.$", text)
  assert ways is not None, text
  validate_devices(config_of("auto", exchange, 1.0), 8)
  for other in ways[1].split(" or "):
    validate_devices(config_of(dispatcher, other, 1.0), 8)


@pytest.mark.parametrize("dispatcher", [*DISPATCHERS, "auto"])
@pytest.mark.parametrize("factor", [1.0, None])
def test_exchange_auto_carries_every_dispatcher(dispatcher, factor):
  """The same flag means the same on every mesh whose devices divide the groups."""
  for mesh in layer.MESHES.values():
    config = config_of(dispatcher, "auto", factor)
    config.mesh = mesh
    config.train.batch_size = 8
    validate_devices(config, 8)


def test_a_router_that_mixes_tokens_names_what_carries_it():
  """Soft MoE has no rows to send; the refusal does not name the dispatcher it lacks."""
  shell = layer.make("soft", 1.0, exchange="ragged")
  with pytest.raises(ConfigError, match="a router that mixes tokens does not run"):
    layer.compute(shell, 1.0, layer.MESHES[MESH], 8)


def test_what_a_dispatcher_computes_does_not_depend_on_evaluation():
  """Evaluation takes the named dispatcher too: a dropless pass has the same numbers."""
  out = []
  for dispatcher in DISPATCHERS:
    shell = layer.make("top2", None, dispatcher=dispatcher)
    (y, _, _, _), _ = layer.compute(shell, None, layer.MESHES[MESH], 8)
    out.append(y)
  for y in out[1:]:
    np.testing.assert_allclose(y, out[0], rtol=1e-5, atol=1e-5)


def test_the_layer_goes_by_the_configs_number_of_choices():
  """As its check does, also where experts choose: K = P goes by ring, which has no
  buffer, so nothing is lost, however small the buffer."""
  mesh = layer.MESHES["expert 2 x fsdp 2 x tensor 2"]
  shell = layer.make("expert_choice", 1.0, dispatcher="grouped", exchange_buffer=0.25)
  (_, _, stats, _), _ = layer.compute(shell, 1.0, mesh, 8)
  assert stats.lost is None
  assert stats.load.sum() == layer.on_one_device("expert_choice", 1.0)[0][2].load.sum()
