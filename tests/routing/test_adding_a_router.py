"""A router of one's own in one file runs everywhere: examples/my_router.py."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cli import listing
from moejax.cli.flags import load_config
from moejax.config import Config
from moejax.config import check as config_check
from moejax.config import text as config_text
from moejax.cost.parameters import count_parameters
from moejax.errors import ConfigError
from moejax.models.decoder import Decoder
from moejax.routing import registry
from moejax.routing.base import RouterInputs, SlotPolicy
from moejax.routing.registry import ROUTERS
from moejax.run import writers
from moejax.sharding.mesh import make_mesh
from moejax.train import loop
from tests import reference_routing as reference
from tests.train.conftest import cache_dir, compilation_cache, tiny_config

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples/my_router.py"
T, E, K = 24, 4, 2

__all__ = ["cache_dir", "compilation_cache"]
"""Fixtures, shared with the tests of training."""


@pytest.fixture
def config(monkeypatch) -> Config:
  """A small run under the file's router; the registry is as before afterwards."""
  monkeypatch.setattr(ROUTERS, "_found", dict(ROUTERS._found))
  chosen = load_config(str(FILE))
  config = tiny_config(num_steps=4, eval_every=2, checkpoint_every=2)
  config.moe.router, config.moe.options = chosen.moe.router, chosen.moe.options
  config.moe.num_selected, config.moe.num_experts = K, E
  return config


def test_it_is_one_short_file_and_the_page_names_all_of_it():
  lines = FILE.read_text().splitlines()
  assert len(lines) < 70 and len([x for x in lines if x.strip()]) < 60
  page = (ROOT / "docs/adding_a_router.md").read_text()
  for part in ("parameters(sizes)", "update(params, stats)", "loss_weights()"):
    assert part in page


def test_its_choice_is_that_of_numpy(config):
  """Probabilities of tempered logits; boosts choose and do not weigh."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(T, E)).astype(np.float32)
  temperature, boost = rng.normal(size=E), rng.normal(size=E) / 4
  params = {"temperature": temperature, "boost": boost}
  inputs = RouterInputs(
    logits=jnp.asarray(logits),
    valid=jnp.ones(T, bool),
    params={k: jnp.asarray(v, jnp.float32) for k, v in params.items()},
  )
  router, policy = ROUTERS["tempered"](), SlotPolicy(num_experts=E, num_selected=K)
  got = jax.jit(lambda inputs: router(inputs, policy))(inputs)
  hot = logits.astype(np.float64) * np.exp(temperature)
  probs = np.stack([reference.softmax(row) for row in hot])
  best = np.argsort(-(probs + boost), axis=1)[:, :K]
  np.testing.assert_array_equal(np.asarray(got.assignments.expert).reshape(T, K), best)
  gate = np.take_along_axis(probs, best, axis=1)
  np.testing.assert_allclose(
    np.asarray(got.assignments.gate).reshape(T, K), gate, rtol=1e-4
  )
  assert got.losses is not None
  np.testing.assert_allclose(got.losses["spread_loss"], temperature.var(), rtol=1e-5)
  moved = router.update(inputs.params, got.stats)["boost"]
  load = np.bincount(best.reshape(-1), minlength=E)
  step = 0.001 * np.sign(T * K / E - load)
  np.testing.assert_allclose(moved, boost + step, atol=1e-7)


def test_its_options_are_flags(config):
  """Typed, in range, its own, listed, and stored."""
  config_check.validate(config)
  assert config_text.to_dict(config)["moe"]["tempered"] == {
    "rate": 0.002,
    "spread_weight": 0.01,
  }
  for text, part in (("2", "at most 1"), ("x", "expected a number")):
    with pytest.raises(ConfigError, match=part):
      value = config_text.parse_value("moe.tempered.rate", text)
      config_text.set_field(config, "moe.tempered.rate", value)
  with pytest.raises(ConfigError, match=r"router=top_k: this router does not read it"):
    config_check.refuse_unread(
      dataclasses.replace(config, moe=dataclasses.replace(config.moe, router="top_k")),
      ["moe.tempered.rate"],
    )
  assert "tempered.rate=0.001" in listing.describe("routers")


def test_its_parameters_are_counted_and_its_boosts_are_not_trained(config):
  model = Decoder(config.model, config.moe, vocab_size=64)
  total, _ = count_parameters(config, 64)
  assert total["total"] == sum(x.size for x in jax.tree.leaves(model.shapes()))
  names = {
    jax.tree_util.keystr(path): value
    for path, value in jax.tree_util.tree_leaves_with_path(model.trained())
  }
  untrained = [name for name, value in names.items() if not value]
  assert untrained and all("boost" in name for name in untrained)


@pytest.mark.parametrize(
  ("dispatcher", "mesh", "factor"),
  [
    ("einsum", (1, 1), 1.0),
    pytest.param("gather", (1, 1), 1.0, marks=pytest.mark.slow),
    pytest.param("grouped", (1, 1), None, marks=pytest.mark.slow),
    ("auto", (2, 2), 1.0),
    pytest.param("auto", (2, 2), None, marks=pytest.mark.slow),
  ],
)
def test_it_trains_and_resumes_under_every_dispatcher_and_on_a_mesh(
  config, dispatcher, mesh, factor, cache_dir, compilation_cache, tmp_path
):
  """Four steps, two of them after a checkpoint: temperatures and boosts have moved."""
  data, expert = mesh
  config.data.cache_dir = cache_dir
  config.moe.dispatcher, config.moe.capacity_factor = dispatcher, factor
  config.mesh.data, config.mesh.expert = data, expert
  config.train.sample = config.train.report = config.train.tensorboard = False
  devices = jax.devices()[: data * expert]
  config.train.num_steps = 2
  loop.train(config, tmp_path, devices=devices)
  config.train.num_steps = 4
  assert loop.train(config, tmp_path, devices=devices)["step"] == 4
  lines = writers.read(tmp_path / writers.METRICS_FILE)
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  assert all(np.isfinite(line["spread_loss"]) for line in lines)
  assert lines[0]["spread_loss"] == 0 and lines[-1]["spread_loss"] > 0
  assert make_mesh(config.mesh, devices).size == data * expert


def test_options_that_are_no_dict_are_one_line():
  """As in a config file that sets `moe.options` by hand."""
  with pytest.raises(ConfigError, match=r"'top_k': 0.2 is not a dict of options. In Pyt"):
    registry.make("top_k", cast(Any, 0.2))
