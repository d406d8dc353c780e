"""Speed to quality: steps, FLOPs and time to the loss at which the dense twin ends."""

import numpy as np
import pytest

from moejax.sweep.laws.speedup import Curve
from moejax.sweep.report import (
  figures,
  quality,
  quality_curves,
  run_values,
  sentences,
  summary,
  tables,
)
from tests.sweep.report import report_cases as cases

STEPS = (100, 200, 300, 400)


def runs(losses, *, twin, shift=(0.0, 0.0), **fields):
  """Two seeds of one setting, each with `losses` at STEPS; it ends at the last."""
  return [
    cases.record(
      losses[-1] + s,
      seed=i,
      curve=run_values.Curve(eval_step=STEPS, eval_loss=tuple(x + s for x in losses)),
      step_ms=10.0 if twin else 20.0,
      values={"training_flops": 6e12 if twin else 9e12},
      moe__dense_twin=twin,
      **fields,
    )
    for i, s in enumerate(shift)
  ]


def sweep():
  """A twin that ends at 2.25; E=8 is there in half the steps; E=64 never is."""
  return [
    *runs((4.0, 3.0, 2.5, 2.25), twin=True),
    *runs((3.5, 2.25, 2.1, 2.0), twin=False, moe__num_experts=8),
    *runs((4.0, 3.5, 3.2, 3.0), twin=False, moe__num_experts=64),
  ]


def settings(records):
  return summary.settings(cases.of(records))


def test_steps_flops_and_time_by_hand():
  """400 steps against 200; a step costs 1.5 times the FLOPs and twice the time."""
  by_experts = {
    a.setting.values["moe.num_experts"]: a for a in quality.speedups(settings(sweep()))
  }
  found = by_experts[8]
  assert found.steps.target == 2.25 and found.steps.ratio == 2.0
  assert found.flops.ratio == pytest.approx(2 / 1.5)
  assert found.time is not None and found.time.ratio == 1.0
  assert (found.steps.low, found.steps.high) == (2.0, 2.0)
  assert by_experts[64].steps.ratio == 0


def test_the_twin_that_ends_lowest_is_the_baseline():
  """A twin with a worse learning rate would flatter the sparse side."""
  worse = runs((4.0, 3.5, 3.2, 3.1), twin=True, optimizer__learning_rate=1.0)
  found = quality.speedups(settings(worse + sweep()))
  assert {a.steps.target for a in found} == {2.25}


def test_a_setting_tuned_with_one_seed_neither_leads_nor_is_the_baseline():
  """Its one seed may be lucky: the settings with all seeds are named."""
  lucky = runs(
    (2.0, 1.5, 1.4, 1.3), twin=True, shift=(0.0,), optimizer__learning_rate=1.0
  )
  fast = runs((2.0, 1.9, 1.8, 1.7), twin=False, shift=(0.0,), moe__num_experts=16)
  answers = quality.speedups(settings(lucky + fast + sweep()))
  assert {a.steps.target for a in answers} == {2.25}
  assert "num_experts=8" in quality.in_words(answers).partition(" reaches ")[0]


def test_one_side_alone_has_no_answer():
  both = sweep()
  assert quality.speedups(settings(both[:2])) == []
  assert quality.speedups(settings(both[2:])) == []
  assert quality_curves.draw(settings(both[2:])) == []


def test_a_seed_evaluated_at_other_steps_is_not_compared():
  """Means over seeds would mix steps."""
  records = sweep()
  # The second seed of E=8.
  odd = run_values.Curve(eval_step=(100, 400), eval_loss=(3.5, 2.0))
  object.__setattr__(records[3], "curve", odd)
  found = quality.speedups(settings(records))
  assert [a.setting.values["moe.num_experts"] for a in found] == [64]
  grouped = settings(records)
  said = sentences.write(cases.of(records), grouped, ("moe.num_experts",))
  assert any("num_experts=8" in t and "different steps" in t for t in said.unknown)


def test_the_interval_is_of_seeds():
  """With seeds that differ, the interval holds the ratio and has a width."""
  records = [
    *runs((4.0, 3.0, 2.5, 2.25), twin=True, shift=(-0.1, 0.1)),
    *runs((3.5, 2.25, 2.1, 2.0), twin=False, shift=(0.1, -0.1), moe__num_experts=8),
  ]
  (found,) = quality.speedups(settings(records))
  assert found.steps.low < 2.0 < found.steps.high


def test_sentence_and_table_hold_the_numbers():
  found = cases.of(sweep())
  grouped = summary.settings(found)
  axes = summary.axes(grouped, found.fields)
  said = sentences.write(found, grouped, axes)
  (text,) = [f.text for f in said.findings if f.topic == "Speed to quality"]
  assert "2.00x (90% interval 2.00 to 2.00) fewer steps" in text
  assert "1.33x" in text and "1.00x (90% interval 1.00 to 1.00) less time" in text
  (table,) = [
    t for t in tables.make(found, grouped, axes) if t.name == "speed_to_quality"
  ]
  assert [row["steps, times fewer"] for row in table.rows] == [2.0, 0.0]
  drawn = {figure.name for figure in figures.make(found, grouped, axes)}
  assert {"held_out_curves", "steps_saved"} <= drawn


def test_a_loss_passed_before_the_first_evaluation_is_a_bound():
  """The setting begins below the twin's end: 4x is the least that it can be."""
  found = cases.of([*sweep()[:2], *runs((2.0, 1.9, 1.8, 1.7), twin=False)])
  (answer,) = quality.speedups(summary.settings(found))
  assert "with at least 4.00x (a side reached it before" in quality.in_words([answer])


def test_nobody_gets_there():
  found = cases.of([*sweep()[:2], *sweep()[4:]])
  grouped = summary.settings(found)
  said = sentences.write(found, grouped, summary.axes(grouped, found.fields))
  (text,) = [f.text for f in said.findings if f.topic == "Speed to quality"]
  assert text.startswith("No setting reaches the held-out loss at which the dense twin")


def test_steps_saved_by_hand():
  """The twin's loss 3 at step 200 is the sparse setting's at 150: 1.33 times."""
  twin = Curve(cost=np.array([100.0, 200.0]), loss=np.array([4.0, 3.0]))
  sparse = Curve(cost=np.array([100.0, 200.0, 300.0]), loss=np.array([3.5, 2.5, 2.0]))
  # At step 100 the twin has 4.0, which the sparse setting had before its first point.
  assert quality_curves.saved_steps(twin, sparse) == [(200.0, pytest.approx(200 / 150))]


def test_a_log_gives_the_held_out_curve(tmp_path):
  """Only lines with an evaluation count, in their order."""
  path = cases.write_run(tmp_path / "run")
  log = path / "metrics.jsonl"
  lines = log.read_text().splitlines()
  lines[9] = lines[9][:-1] + ', "validation_loss": 4.5}'
  lines[19] = lines[19][:-1] + ', "validation_loss": 3.5}'
  log.write_text("\n".join(lines) + "\n")
  curve = run_values.read(path, cases.make_config(), {}).curve
  assert curve.eval_step == (10, 20) and curve.eval_loss == (4.5, 3.5)
