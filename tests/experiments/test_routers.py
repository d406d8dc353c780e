"""The study of routers: every variant is a valid config, and the sums are right."""

import json

import pytest

from configs import default
from experiments.routers import run
from moejax.config import check as config_check
from moejax.config import text as config_text
from moejax.cost import flops, parameters


def configured(settings):
  config = default.get_config()
  for setting in settings:
    name, value = setting.split("=")
    config_text.set_field(config, name, config_text.parse_value(name, value))
  return config


@pytest.mark.parametrize("name", run.VARIANTS)
def test_variants_are_valid_and_do_the_same_work(name):
  """Active FLOPs outside the router are those of switch, whatever the router."""
  config = configured(run.VARIANTS[name])
  config_check.validate(config)
  mine = flops.flops_per_token(config, 1024)
  reference = flops.flops_per_token(configured(run.VARIANTS["switch"]), 1024)
  assert mine["total"] - mine["router"] == reference["total"] - reference["router"]
  if not config.moe.dense_twin:
    total, _ = parameters.count_parameters(config, 1024)
    expected, _ = parameters.count_parameters(default.get_config(), 1024)
    assert total["experts"] == expected["experts"]


def write_run(directory, loss, dropped):
  directory.mkdir()
  config = {"train": {"batch_size": 4}, "data": {"sequence_length": 50}}
  (directory / "config.json").write_text(json.dumps(config))
  (directory / "eval.json").write_text(json.dumps({"loss": loss}))
  moe = {"max_load_ratio": [1.0, 3.0], "entropy_fraction": [0.5, 0.7]}
  line = {"tokens_per_second": 1000.0, "dropped_fraction": dropped, "moe": moe}
  (directory / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_a_row_is_the_mean_of_its_seeds(tmp_path):
  """Loss 2 and 3: mean 2.5, deviation 0.7071; 200 tokens at 1000/s are 200 ms."""
  write_run(tmp_path / "a", 2.0, 0.1)
  write_run(tmp_path / "b", 3.0, 0.3)
  row = run.summarise([run.read_run(tmp_path / name) for name in "ab"])
  assert row["loss"] == 2.5 and row["loss_std"] == pytest.approx(0.70711, abs=1e-5)
  assert row["milliseconds_per_step"] == pytest.approx(200)
  assert row["dropped"] == pytest.approx(0.2)
  assert row["max_load_ratio"] == 2.0
  rows = [{"router": "x"} | row, {"router": "y"} | row | {"loss": 1.0}]
  lines = run.table(rows).splitlines()
  assert lines[2].startswith("| y | 1.0000") and "20.0%" in lines[3]
  run.draw(rows, tmp_path / "p.png")
  assert (tmp_path / "p.png").stat().st_size > 5000
