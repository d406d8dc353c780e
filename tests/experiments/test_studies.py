"""The committed studies: each spec builds, its sides do equal work, its results fit."""

import csv
import importlib
import pathlib

import pytest

import experiments
from moejax.cost import flops, parameters
from moejax.options import show
from moejax.sweep.points import expand
from moejax.sweep.report import tables
from moejax.sweep.spec import Point, Spec
from tools import surgery_studies

ROOT = pathlib.Path(experiments.__file__).parent
STUDIES = sorted(path.parent.name for path in ROOT.glob("*/spec.py"))
VOCABULARY = 1024
EQUAL_TOTALS = ("apart",)
"""Dense and sparse sides differ per token."""


@pytest.fixture(scope="module", params=STUDIES)
def study(request) -> tuple[str, Spec, list[Point]]:
  spec = importlib.import_module(f"experiments.{request.param}.spec").get_sweep()
  return request.param, spec, expand.points(spec)


def test_all_settings_of_a_study_do_the_same_work(study):
  """Active FLOPs per token differ by at most 1%; outside the router, unless matched."""
  name, spec, points = study
  if name in EQUAL_TOTALS:
    pytest.skip("its sides do the same work in all")
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


def training_flops(config) -> float:
  count = flops.flops_per_token(config, VOCABULARY)["total"]
  return count * flops.tokens_per_step(config) * config.train.num_steps


def test_upcycled_runs_pay_for_their_dense_model():
  """A budget is spent to half a step, with the dense steps that its start had."""
  from experiments.upcycle import dense, spec

  ages = {p.config.train.num_steps: p.config for p in expand.points(dense.get_sweep())}
  sweep = spec.get_sweep()
  points = expand.points(sweep)
  twin = next(p for p in points if p.config.moe.dense_twin).config
  step = training_flops(twin) / twin.train.num_steps
  for point in points:
    total = int(point.settings["variant"].split(",")[1])
    spent = training_flops(point.config)
    if age := spec.start_age(point.config):
      assert point.config.train.init_from.endswith(f"seed={point.config.train.seed}")
      spent += training_flops(ages[age])
    assert spent == pytest.approx(total * step, abs=0.6 * step)


def test_joined_runs_pay_for_all_that_was_trained_apart():
  """All sides have the same total, the seed model and every branch included.

  The joined model that is trained for longer has more than they.
  """
  from experiments.apart import base, branches, seeds, spec

  def spent(sweep: Spec, rate: float) -> float:
    configs = [p.config for p in expand.points(sweep)]
    kept = [c for c in configs if c.optimizer.learning_rate == rate]
    return sum(training_flops(c) for c in kept) / len(sweep.seeds)

  seed = spent(seeds.get_sweep(), base.base().optimizer.learning_rate)
  joined = seed + spent(branches.get_sweep(), base.RATES["branch"])
  before = {"seed": seed, "upcycled": seed, "joined": joined, "means": joined}
  totals: dict[str, float] = {}
  for point in expand.points(spec.get_sweep()):
    start = point.config.train.init_from.rpartition("/")[2].partition("=")[0]
    side = spec.side_of(point.config)
    totals[side] = training_flops(point.config) + before.get(start, 0.0)
  longer = totals.pop("joined, longer")
  assert set(totals) | {"joined, longer"} == set(spec.sides())
  assert max(totals.values()) / min(totals.values()) < 1.001 < longer / totals["joined"]


@pytest.mark.parametrize("name", ["upcycle", "apart"])
def test_surgery_makes_the_model_that_the_sweep_trains(name):
  """The flags of run.sh are those of the spec."""
  base = importlib.import_module(f"experiments.{name}.base")
  script = (ROOT / name / "run.sh").read_text()
  for field, value in base.SPARSE.items():
    assert f"--config.{field}={show(value)}" in script


def test_the_page_on_pruning_shows_the_rates_that_were_tried():
  """Its losses are the committed ones of seed 0, and the rate in bold is the one used."""
  from experiments.prune import base

  with open(ROOT / "prune" / "results.csv") as file:
    losses = {r["variant"]: r["loss"] for r in csv.DictReader(file) if r["seed"] == "0"}
  page = (ROOT / "prune" / "README.md").read_text()
  sides = {
    8: ("whole", "whole"),
    6: ("6 experts", "reap, 6"),
    4: ("4 experts", "reap, 4"),
  }
  for experts, (words, side) in sides.items():
    cells = []
    for rate in base.TRIED:
      loss = f"{float(losses[f'{side}, rate {rate:g}']):.4f}"
      cells.append(f"**{loss}**" if rate == base.BEST[experts] else loss)
    assert f"| {words} | {' | '.join(cells)} |" in page


@pytest.mark.parametrize("name", ["upcycle", "prune", "apart"])
def test_tables_of_surgery_are_of_the_committed_results(name):
  """What the study's page shows is computed from the runs beside it."""
  table, _ = surgery_studies.DRAWN[name]()
  text = (ROOT / name / "tables" / f"{name}.csv").read_text()
  assert tables.frame(table).to_csv(index=False) == text
