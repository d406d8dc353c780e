"""Runs recorded before routers owned their options (schema 1) go on as they would have.

tests/golden/schema_1 holds, per router, the directory of a run after two steps, and what
two more steps of the same code gave: 8 wide, on the text in tests/data/corpus.
"""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.checkpoint import inspect as checkpoint_inspect
from moejax.config import text as config_text
from moejax.run import workdir, writers
from moejax.train import loop

FOLDER = Path(__file__).parents[1] / "golden/schema_1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
OPTIONS = {
  "noisy_top_k": {
    "noise": "learned",
    "noise_std": 0.5,
    "importance_weight": 0.01,
    "load_weight": 0.02,
  },
  "sigmoid_bias": {
    "num_expert_groups": 2,
    "num_selected_groups": 1,
    "group_best": 1,
    "bias_update_rate": 0.01,
  },
  "hash": {"spread": "balanced"},
}


@pytest.fixture(params=sorted(EXPECTED))
def run(request, tmp_path, monkeypatch):
  """The recorded directory, and the name of its router."""
  with tarfile.open(FOLDER / f"{request.param}.tar.xz") as file:
    file.extractall(tmp_path / "run", filter="data")
  # Its config names the text by a path from the root of the repository.
  monkeypatch.chdir(Path(__file__).parents[2])
  return request.param, tmp_path / "run"


def test_options_move_to_the_router_that_read_them(run):
  """By name and value; what other routers would have read is gone."""
  router, path = run
  stored = json.loads((path / "config.json").read_text())
  assert stored["schema_version"] == 1 and "second_policy" in stored["moe"]
  config = workdir.read_config(path)
  assert config.schema_version == 2
  assert config_text.router_options(config) == OPTIONS[router]
  values = config_text.to_dict(config)
  assert values["moe"][router] == OPTIONS[router]
  assert config_text.from_dict(values) == config
  kept = set(stored["moe"]) & set(values["moe"]) - {"router"}
  assert len(kept) > 30
  assert all(stored["moe"][name] == values["moe"][name] for name in kept)


def test_the_checkpoint_restores_to_the_bit(run):
  """Every array: parameters, table, biases, moments, key."""
  router, path = run
  report = checkpoint_inspect.inspect(path, 2)
  assert report["sha256_all"] == EXPECTED[router]["sha256_all_2"]


@pytest.mark.parametrize(
  "run",
  [
    pytest.param(name, marks=[] if name == "hash" else pytest.mark.slow)
    for name in sorted(EXPECTED)
  ],
  indirect=True,
)
def test_the_run_goes_on_as_the_code_of_its_day_did(run, tmp_path, compilation_cache):
  """Two more steps: losses as recorded, to the rounding that another compiler has."""
  router, path = run
  config = workdir.read_config(path)
  config.data.cache_dir = str(tmp_path / "cache")
  config.train.num_steps = 4
  loop.train(config, path, devices=jax.devices()[:1])
  want, lines = EXPECTED[router], writers.read(path / writers.METRICS_FILE)
  np.testing.assert_allclose([x["loss"] for x in lines], want["loss"], rtol=1e-6)
  for name in ("validation_loss", "balance_loss"):
    np.testing.assert_allclose(lines[-1][name], want[name], rtol=1e-6)
