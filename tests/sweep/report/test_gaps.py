"""Runs that diverged, missing seeds and times: nothing is said of what is not there."""

import dataclasses

from moejax.sweep.report import capacity as capacity_lib
from moejax.sweep.report import (
  evaluated,
  quality,
  quality_curves,
  run_values,
  sentences,
  summary,
  tables,
)
from tests.sweep.report import report_cases as cases

SPREAD = (0.0, 0.1, 0.2)


def write(runs):
  found = cases.of(runs)
  settings = summary.settings(found)
  return sentences.write(found, settings, summary.axes(settings, found.fields))


def topic(said, name):
  return [finding.text for finding in said.findings if finding.topic == name]


def lost(seed, **fields):
  """A run that is done without a finite loss."""
  return cases.record(None, seed=seed, **fields)


def experts(e, mean, spread=SPREAD, **kwargs):
  return cases.seeds(mean, spread, moe__num_experts=e, **kwargs)


def capacity(factor, mean, spread=SPREAD, **kwargs):
  return cases.seeds(mean, spread, moe__capacity_factor=factor, **kwargs)


def test_a_missing_step_time_is_not_0_ms():
  """The setting without times is in no comparison by time, and is named; losses count."""
  runs = [
    *experts(4, 3.0),
    *experts(8, 3.001, values={"step_ms_p50": None}),
    *experts(16, 2.8, step_ms=20),
  ]
  said = write(runs)
  assert not any("100% less" in finding.text for finding in said.findings)
  (text,) = topic(said, "Loss against step time")
  assert text.startswith("Of 2 settings, 2 are not beaten")
  assert any(
    t.startswith("Step times of num_experts=8: not every run") for t in said.unknown
  )
  (first, second) = topic(said, "Doubling the experts")
  assert first.startswith("Going from 4 to 8 experts changes the loss by +0.0010")
  assert second.startswith("Going from 8 to 16 experts") and "step time" not in second


def test_factors_without_a_common_seed_are_not_compared():
  """Dropless has seeds 0 and 1, the largest factor only seed 2."""
  largest = cases.record(3.2, seed=2, moe__capacity_factor=2.0)
  runs = [*capacity(1.0, 3.0), largest, *capacity(None, 2.99, (0.0, 0.1))]
  said = write(runs)
  assert topic(said, "Sufficient capacity") == []
  why = "Which capacity factor suffices: 2 and dropless have no seed in common."
  assert why in said.unknown


def test_a_factor_that_diverged_does_not_suffice():
  """In every seed or in one of three: smaller factors are not taken to suffice either."""
  rest = [*capacity(1.0, 3.0), *capacity(None, 3.0)]
  for bad in (
    [lost(s, moe__capacity_factor=2.0) for s in range(3)],
    [*capacity(2.0, 2.9, (0.0, 0.1)), lost(2, moe__capacity_factor=2.0)],
  ):
    said = write([*rest, *bad])
    assert topic(said, "Sufficient capacity") == []
    assert "Which capacity factor suffices: a run at 2 diverged." in said.unknown
  said = write(
    [*capacity(2.0, 3.0), *capacity(None, 3.0), lost(0, moe__capacity_factor=1.0)]
  )
  (text,) = topic(said, "Sufficient capacity")
  assert text.startswith("From 2 on")


def test_without_dropless_or_its_error_no_factor_suffices():
  """The reason is listed, once for all cells that share it."""
  bounded = [*capacity(1.0, 3.0), *capacity(2.0, 2.9)]
  assert any(
    "no dropless run (capacity_factor none)" in t for t in write(bounded).unknown
  )
  said = write([*bounded, cases.record(2.9, moe__capacity_factor=None)])
  assert any("dropless has one seed" in text for text in said.unknown)
  assert topic(said, "Sufficient capacity") == []


def test_a_doubling_with_one_seed_is_unknown():
  said = write(
    [*experts(4, 3.0, (0.0, 0.1)), cases.record(2.9, seed=1, moe__num_experts=8)]
  )
  assert any("going from 4 to 8 experts (-0.2000 nats/token)" in t for t in said.unknown)


def test_the_best_of_those_with_all_seeds_is_not_the_best_of_all():
  """One sparse seed diverged; the others are lower: no command to copy the dense twin."""
  dense = cases.seeds(3.0, SPREAD, moe__dense_twin=True)
  sparse = cases.seeds(2.8, SPREAD, moe__dense_twin=False)
  sparse[1] = lost(1, moe__dense_twin=False)
  said = write([*dense, *sparse])
  assert topic(said, "Lowest loss") == [
    "Only dense_twin=true has all 3 seeds, with a mean loss of 3.1000 ± 0.0577 "
    "nats/token. Lower over the seeds they share: dense_twin=false by -0.2000 "
    "nats/token (90% interval -0.2000 to -0.2000, 2 seeds)."
  ]
  assert not any(finding.command for finding in said.findings)
  assert any("dense_twin=false (2 seeds, 1 more diverged)" in t for t in said.unknown)


def test_the_best_of_several_with_all_seeds_says_so():
  runs = [*experts(4, 3.0), *experts(8, 2.8, (0.0, 0.1)), *experts(16, 2.95)]
  (text,) = topic(write(runs), "Lowest loss")
  assert text.startswith("Of 2 settings with all 3 seeds, num_experts=16 has the lowest")
  assert "Lower over the seeds they share: num_experts=8 by -0.1500" in text
  (front,) = topic(
    write([*runs, *experts(32, 2.9, step_ms=30)]), "Loss against step time"
  )
  assert front.startswith("Of 3 settings with all 3 seeds, 2 are not beaten")


def test_equal_losses_and_times_are_both_not_beaten():
  """An exact tie: neither is left out, and no interval of 0 to 0 `includes 0`."""
  runs = [*experts(4, 3.0), *experts(8, 3.0), *experts(16, 3.1, step_ms=20)]
  said = write(runs)
  (text,) = topic(said, "Loss against step time")
  assert "2 are not beaten" in text and "num_experts=4 (" in text
  assert not any("seeds includes 0" in text for text in said.unknown)
  assert any(
    t.endswith("the loss: no difference in any of 3 seeds.") for t in said.unknown
  )


STEPS = (100, 200, 300, 400)


def curved(losses, seeds, *, twin, shift=SPREAD):
  return [
    cases.record(
      losses[-1] + shift[s],
      seed=s,
      curve=run_values.Curve(
        eval_step=STEPS, eval_loss=tuple(loss + shift[s] for loss in losses)
      ),
      moe__dense_twin=twin,
    )
    for s in seeds
  ]


def test_steps_saved_are_drawn_over_the_seeds_of_the_table():
  """A sparse setting with seed 0 alone is held against the twin's seed 0 alone.

  At its last step the twin of seed 0 has 2.5, which the sparse setting has at step 250;
  the twin's mean over seeds is 2.6, which it has earlier.
  """
  runs = [
    *curved((4.0, 3.5, 3.0, 2.5), range(3), twin=True),
    *curved((3.5, 3.0, 2.0, 1.9), [0], twin=False),
  ]
  found = summary.settings(cases.of(runs))
  (answer,) = quality.speedups(found)
  figure = next(f for f in quality_curves.draw(found) if f.name == "steps_saved")
  chart = figure.chart.to_dict()
  drawn = chart["datasets"][chart["layer"][0]["data"]["name"]]
  assert drawn[-1]["step"] == 400 and answer.steps.ratio == 400 / 250
  assert drawn[-1]["ratio"] == answer.steps.ratio


def test_speed_to_quality_says_which_side_diverged():
  runs = [
    *curved((4.0, 3.5, 3.0, 2.5), range(3), twin=True),
    *curved((3.5, 3.0, 2.0, 1.9), range(2), twin=False),
    lost(2, moe__dense_twin=False),
  ]
  (text,) = topic(write(runs), "Speed to quality")
  assert "Seeds without a finite loss do not count: dense_twin=false (1 diverged)" in text


def with_evaluation(run, name, loss):
  return dataclasses.replace(run, evaluations={name: (loss, 0.25)})


def test_other_evaluations_have_a_sentence_and_a_table():
  """Undecided by the runs' own loss, decided on the test split: means 2.1 and 2.05."""
  runs = [
    with_evaluation(run, "test@1.25", base + SPREAD[run.values["seed"]])
    for e, base, noise in ((4, 2.0, SPREAD), (8, 1.95, (0.1, 0.1, 0.1)))
    for run in experts(e, 3.0, noise)
  ]
  said = write(runs)
  assert topic(said, "Evaluated on test@1.25") == [
    "Of 2 settings, num_experts=8 has the lowest mean loss: 2.0500 ± 0.0577 nats/token "
    "(3 seeds). Every other setting is higher, with 90% intervals above 0."
  ]
  found = cases.of(runs)
  settings = summary.settings(found)
  made = tables.make(found, settings, ("moe.num_experts",))
  (table,) = [table for table in made if table.name == "evaluations"]
  cells = [[row[n] for n in ("evaluation", "seeds", "dropped")] for row in table.rows]
  assert cells == [["test@1.25", 3, 0.25]] * 2
  assert round(table.rows[1]["loss"], 6) == 2.05


def test_the_runs_own_evaluation_is_no_other():
  """Its loss is the run's: it would be said twice."""
  runs = [
    with_evaluation(r, "validation@dropless", r.values["loss"]) for r in experts(4, 3.0)
  ]
  assert evaluated.names(summary.settings(cases.of(runs))) == []
  one = [
    with_evaluation(cases.record(3.0, moe__num_experts=e), "test@1", 2.0) for e in (4, 8)
  ]
  assert topic(write(one), "Evaluated on test@1") == []


def test_capacity_that_failed_in_all_seeds_is_still_an_answer_of_its_cell():
  """Only dropless has finite losses."""
  runs = [*capacity(None, 3.0), *(lost(s, moe__capacity_factor=1.0) for s in range(3))]
  found = cases.of(runs)
  diverged = [run.settings for run in summary.diverged(found)]
  axes = ("moe.capacity_factor",)
  (answer,) = capacity_lib.sufficient(summary.settings(found), axes, diverged)
  assert answer.sufficient is None and answer.refused == "a run at 1 diverged"
