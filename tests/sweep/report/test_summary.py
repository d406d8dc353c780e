"""Means, intervals and answers, against numbers worked out by hand."""

import math

import pytest

from moejax.sweep.report import analyses, capacity, summary
from tests.sweep.report import report_cases as cases

EXPERTS, CAPACITY = "moe.num_experts", "moe.capacity_factor"


def settings(runs):
  return summary.settings(cases.of(runs))


def axes(runs):
  found = cases.of(runs)
  return summary.axes(summary.settings(found), found.fields)


def test_an_interval_is_students():
  """1, 2, 3: mean 2, sd 1, and t(0.95, 2 degrees) = 2.919986 / sqrt 3 on each side."""
  found = summary.student([1.0, 2.0, 3.0])
  assert found.estimate == 2 and found.n == 3
  assert found.high == pytest.approx(2 + 2.919986 / math.sqrt(3), abs=1e-6)
  assert found.low == pytest.approx(2 - 2.919986 / math.sqrt(3), abs=1e-6)
  assert found.certain and not summary.student([-1.0, 2.0]).certain


def test_one_seed_has_no_interval():
  """An interval of no width would claim certainty."""
  found = summary.student([1.0])
  assert (found.low, found.high, found.certain) == (None, None, False)


def test_a_setting_is_its_finished_runs_over_seeds():
  """Mean, sd with n - 1, standard error; neither an open run nor a lost loss counts."""
  runs = cases.seeds(3.0, (0.0, 0.1, 0.2), moe__num_experts=4)
  runs += [
    cases.record(9.0, seed=5, state="running", moe__num_experts=4),
    cases.record(None, seed=6, moe__num_experts=4),
    cases.record(2.0, moe__num_experts=8),
  ]
  four, eight = settings(runs)
  assert four.label == "num_experts=4" and four.n == 3
  assert four.mean == pytest.approx(3.1) and four.sd == pytest.approx(0.1)
  assert four.se == pytest.approx(0.1 / math.sqrt(3))
  assert (eight.n, eight.sd, eight.se) == (1, None, None)


def test_settings_ascend_with_dropless_last():
  """In the order of the axes, numbers by size: 2 before 16."""
  runs = [
    cases.record(3, moe__num_experts=e, moe__capacity_factor=c)
    for e in (16, 2)
    for c in (None, 2.0, 1.25)
  ]
  found = [(s.values[EXPERTS], s.values[CAPACITY]) for s in settings(runs)]
  assert found == [(e, c) for e in (2, 16) for c in (1.25, 2.0, None)]


def test_what_follows_from_an_axis_is_none():
  """A width solved for equal FLOPs at each E; and --match leaves one of them alone."""
  runs = [
    cases.record(3, moe__num_experts=e, moe__hidden=h, moe__capacity_factor=c)
    for e, h in ((4, 512), (8, 510), (16, 510))
    for c in (1.0, None)
  ]
  assert axes(runs) == (EXPERTS, CAPACITY)


def test_differences_are_paired_by_seed():
  """What a seed does to both settings is not in the interval; others' seeds are out."""
  a = cases.seeds(3.0, (0.0, 0.5, 1.0), moe__num_experts=4)
  b = cases.seeds(2.9, (0.0, 0.5, 1.0, 7.0), moe__num_experts=8)
  gap = summary.paired(*settings(a + b))
  assert gap is not None and gap.n == 3
  assert gap.estimate == pytest.approx(-0.1)
  assert gap.low == pytest.approx(-0.1) and gap.high == pytest.approx(-0.1)


def test_the_pareto_set_is_what_none_beats():
  """(ms, loss): 10/3.0 and 20/2.5 stay; 15/3.1 and 20/2.6 are beaten, 30/2.5 ties."""
  points = ((10, 3.0), (15, 3.1), (20, 2.5), (20, 2.6), (30, 2.5))
  runs = [
    cases.record(loss, step_ms=ms, moe__hidden=64 * (i + 1))
    for i, (ms, loss) in enumerate(points)
  ]
  front = summary.pareto(settings(runs), "step_ms_p50")
  assert [(s.of("step_ms_p50"), s.mean) for s in front] == [(10, 3.0), (20, 2.5)]


def test_main_effects_are_balanced():
  """Only complete cells count: the cheap level must not gain from easy company.

  Losses at E 4 and 8: 3.0 and 2.8 with capacity 1; 2.0 and 1.6 with 2; and 9.0 at E 4
  alone with capacity 4. Differences -0.2 and -0.4, mean -0.3: effects +-0.15.
  """
  table = {(4, 1.0): 3.0, (8, 1.0): 2.8, (4, 2.0): 2.0, (8, 2.0): 1.6, (4, 4.0): 9.0}
  runs = []
  for (e, c), loss in table.items():
    runs += cases.seeds(
      loss, cases.SEED_SHIFT[:3], moe__num_experts=e, moe__capacity_factor=c
    )
  effects = analyses.main_effects(settings(runs), axes(runs))
  found = [effect for effect in effects if effect.axis == EXPERTS]
  assert [(e.level, e.cells) for e in found] == [(4, 2), (8, 2)]
  assert [e.effect.estimate for e in found] == pytest.approx([0.15, -0.15])
  # Every seed shifts all losses alike, so the effect is the same in each.
  assert found[1].effect.low == pytest.approx(-0.15) and found[1].effect.n == 3
  # Of the capacities, E 4 alone has all three: E 8 is no complete cell.
  capacity = [effect for effect in effects if effect.axis == CAPACITY]
  assert [(e.level, e.cells) for e in capacity] == [(1.0, 1), (2.0, 1), (4.0, 1)]


def test_effects_without_common_seeds_have_no_interval():
  """The mean over levels is then known, and its spread is not."""
  runs = [
    cases.record(3.0, seed=0, moe__num_experts=4),
    cases.record(2.0, seed=1, moe__num_experts=8),
  ]
  low, high = analyses.main_effects(settings(runs), axes(runs))
  assert (low.effect.estimate, high.effect.estimate) == (0.5, -0.5)
  assert low.effect.low is None


@pytest.mark.parametrize(
  ("losses", "expected"),
  [
    # Dropless 2.0, standard error 0.1: 2.1 and less suffices.
    ({1.0: 2.3, 1.25: 2.09, 2.0: 2.05}, 1.25),
    ({1.0: 1.9, 1.25: 2.3, 2.0: 2.05}, 2.0),
    ({1.0: 2.3, 1.25: 2.3, 2.0: 2.3}, None),
  ],
)
def test_sufficient_capacity_is_no_luck(losses, expected):
  """A small factor that does well counts only if every larger one does too."""
  runs = cases.seeds(2.0, (-0.1, 0.1), moe__capacity_factor=None)
  for factor, loss in losses.items():
    runs += cases.seeds(loss, (-0.1, 0.1), moe__capacity_factor=factor)
  (answer,) = capacity.sufficient(settings(runs), (CAPACITY,))
  assert answer.margin == pytest.approx(0.1)
  found = answer.sufficient
  assert (found and found.values[CAPACITY]) == expected
  assert answer.largest == 2.0


def test_doubling_is_read_at_equal_step_time():
  """E 4 from 10 to 40 ms, E 8 from 20 to 80 ms: both are known from 20 to 40 ms.

  At the geometric middle, sqrt 2 x 20 ms, log time is 3/4 of the way for E 4, from
  3.0 to 2.6: 2.7; and 1/4 of the way for E 8, from 2.8 to 2.4: 2.7, but the second
  seed's E 8 is 0.2 lower throughout.
  """
  runs = []
  for e, c, ms, loss in (
    (4, 1.0, 10, 3.0),
    (4, 2.0, 40, 2.6),
    (8, 1.0, 20, 2.8),
    (8, 2.0, 80, 2.4),
  ):
    fields = {"moe__num_experts": e, "moe__capacity_factor": c}
    runs += cases.seeds(loss, (0.0, -0.2 if e == 8 else 0.0), step_ms=ms, **fields)
  (found,) = analyses.doublings(settings(runs), axes(runs))
  assert found.experts == 4
  assert found.step_ms == pytest.approx(20 * math.sqrt(2))
  assert found.difference.estimate == pytest.approx(-0.1)
  assert found.difference.n == 2


def test_without_a_common_step_time_doubling_is_compared_as_it_is():
  """With its price: one capacity factor gives no curve to interpolate along."""
  runs = [
    *cases.seeds(3.0, (0.0, 0.1), step_ms=10, moe__num_experts=4),
    *cases.seeds(2.5, (0.0, 0.1), step_ms=15, moe__num_experts=8),
    *cases.seeds(2.0, (0.0, 0.1), step_ms=15, moe__num_experts=32),
  ]
  (found,) = analyses.doublings(settings(runs), axes(runs))
  assert found.step_ms is None and found.slower == pytest.approx(0.5)
  assert found.difference.estimate == pytest.approx(-0.5)


def isoflop_runs(losses, budget=1e13, num_seeds=1):
  """Sizes 10^4, 10^4.5, 10^5 and so on, at one budget up to the 1% of a solver."""
  return [
    cases.record(
      loss,
      seed=s,
      values={
        "active_parameters": 10 ** (4 + i / 2),
        "training_flops": budget * (1 + 0.01 * (-1) ** i),
      },
      model__width=32 * (i + 1),
      train__num_steps=100 - i,
    )
    for i, loss in enumerate(losses)
    for s in range(num_seeds)
  ]


def test_an_isoflop_minimum_is_that_of_the_quadratic():
  """3 + (x - 5.2)^2 with x = log10 N, sampled at 4, 4.5, ..., 6; two budgets."""
  losses = [3 + (4 + i / 2 - 5.2) ** 2 for i in range(5)]
  runs = isoflop_runs(losses, 1e13, 2)
  runs += isoflop_runs([2 + (4 + i / 2 - 4.9) ** 2 for i in range(5)], 1e14, 2)
  found = cases.of(runs)
  first, second = analyses.isoflops(summary.settings(found), found.fields)
  assert first.minimum is not None and second.minimum is not None
  assert first.budget == pytest.approx(1e13, rel=0.01)
  assert math.log10(first.minimum.estimate) == pytest.approx(5.2)
  assert first.loss == pytest.approx(3.0)
  assert first.minimum.low == pytest.approx(10**5.2)
  assert math.log10(second.minimum.estimate) == pytest.approx(4.9)


@pytest.mark.parametrize(
  ("losses", "why"),
  [
    ([3.0, 2.5, 2.2, 2.1], "at the largest size"),
    ([2.1, 2.2, 2.5, 3.0], "at the smallest size"),
    # Bends down, although its lowest point is inside.
    ([3.0, 2.9, 3.9, 3.05], "no minimum"),
  ],
)
def test_a_minimum_on_the_edge_is_refused(losses, why):
  """The true one may lie anywhere beyond it."""
  found = cases.of(isoflop_runs(losses))
  (curve,) = analyses.isoflops(summary.settings(found), found.fields)
  assert curve.minimum is None and curve.loss is None and why in curve.refused


def test_two_sizes_or_two_budgets_are_no_curve():
  """Nor is a sweep of E at equal FLOPs, whose routers make sizes differ a little."""
  runs = isoflop_runs([3.0, 2.0])
  runs += isoflop_runs([3.0, 2.0], 2e13)
  found = cases.of(runs)
  assert analyses.isoflops(summary.settings(found), found.fields) == []
  runs = [
    cases.record(3.0, values={"active_parameters": 1000 + e}, moe__num_experts=e)
    for e in (4, 8, 16, 32)
  ]
  found = cases.of(runs)
  assert analyses.isoflops(summary.settings(found), found.fields) == []
