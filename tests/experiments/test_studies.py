"""The committed studies: each spec builds, its sides do equal work, its results fit."""

import csv
import importlib
import pathlib

import pytest

import experiments
from moejax.cost import flops, parameters
from moejax.sweep.points import expand
from moejax.sweep.spec import Point, Spec

ROOT = pathlib.Path(experiments.__file__).parent
STUDIES = sorted(path.parent.name for path in ROOT.glob("*/spec.py"))
VOCABULARY = 1024


@pytest.fixture(scope="module", params=STUDIES)
def study(request) -> tuple[str, Spec, list[Point]]:
  spec = importlib.import_module(f"experiments.{request.param}.spec").get_sweep()
  return request.param, spec, expand.points(spec)


def test_all_settings_of_a_study_do_the_same_work(study):
  """Active FLOPs per token differ by at most 1%; outside the router, unless matched."""
  _, spec, points = study
  work = []
  for point in points:
    assert point.config.data.vocab_size == VOCABULARY
    count = flops.flops_per_token(point.config, VOCABULARY)
    work.append(count["total"] - (0 if spec.match else count["router"]))
  assert max(work) / min(work) < 1.01


def test_committed_results_are_of_todays_spec(study):
  """A finished run for every point, named after it and with its exact counts."""
  name, _, points = study
  with open(ROOT / name / "results.csv") as file:
    rows = {row["run"].rpartition("-")[0]: row for row in csv.DictReader(file)}
  # A run's name ends in a hash of its whole config, which a later default may change.
  found = {point.directory.rpartition("-")[0]: point for point in points}
  assert set(rows) == set(found)
  for run, point in found.items():
    row = rows[run]
    total, active = parameters.count_parameters(point.config, VOCABULARY)
    assert row["state"] == "done" and float(row["loss"]) > 0
    assert int(row["parameters"]) == total["total"]
    assert int(row["active_parameters"]) == active["total"]
    assert int(row["num_steps"]) == point.config.train.num_steps
