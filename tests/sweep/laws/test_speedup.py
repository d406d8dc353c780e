"""Speedups, by hand calculation."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from moejax.errors import UserError
from moejax.sweep.laws import curves, speedup
from moejax.sweep.laws.published import PowerLaw


def test_effective_is_the_compute_that_the_baseline_would_need():
  """L = 1 + 16 C^-0.5: 2.6 at C = 100 and 1.8 at C = 400, so 1.8 at C = 100 is 4x."""
  assert PowerLaw(l_inf=1.0, a=16.0, alpha=0.5).formula(C=400.0) == pytest.approx(1.8)
  options: dict[str, Any] = dict(l_inf=1.0, alpha=0.5)
  assert speedup.effective(2.6, 1.8, **options) == pytest.approx(4)
  assert speedup.effective(1.8, 2.6, **options) == pytest.approx(1 / 4)
  assert speedup.effective(2.6, 2.6, **options) == 1


def test_effective_in_time_divides_by_the_lost_throughput():
  """4x in FLOPs at 40 against 50 TFLOP/s is 3.2x in time."""
  ratio = speedup.effective(
    2.6, 1.8, l_inf=1.0, alpha=0.5, baseline_speed=50.0, variant_speed=40.0
  )
  assert ratio == pytest.approx(3.2)


def test_equal_seeds_leave_no_interval_to_speak_of_and_few_are_said():
  """Without spread between seeds the bootstrap is the point itself."""
  result = speedup.over_seeds([2.6] * 3, [1.8] * 3, l_inf=1.0, alpha=0.5)
  assert (result.ratio, result.low, result.high) == pytest.approx((4, 4, 4))
  assert result.notes == ("3 seeds: the interval is narrower than it should be",)


def test_over_seeds_encloses_the_mean_and_stays_within_the_extremes():
  """No resample has means beyond the best and the worst pairing of seeds."""
  baseline, variant = [2.55, 2.6, 2.65], [1.78, 1.8, 1.82]
  options: dict[str, Any] = dict(l_inf=1.0, alpha=0.5)
  result = speedup.over_seeds(baseline, variant, speed_ratio=0.8, **options)
  assert result.ratio == pytest.approx(3.2)
  worst = 0.8 * speedup.effective(2.55, 1.82, **options)
  best = 0.8 * speedup.effective(2.65, 1.78, **options)
  assert worst <= result.low < result.ratio < result.high <= best
  one = speedup.over_seeds([2.6], variant, **options)
  assert math.isnan(one.low) and one.notes == ("one seed: no interval",)


def test_against_an_exact_baseline_is_the_identity_without_an_interval():
  """Runs on the law leave no scatter: the variant of above is 4x, whatever its C."""
  law = PowerLaw(l_inf=1.0, a=16.0, alpha=0.5)
  compute = np.array([25.0, 100.0, 400.0, 1600.0])
  for own in (100.0, 50.0):
    result = speedup.against_baseline(
      compute, law.formula(C=compute), variant_compute=own, variant_loss=1.8, l_inf=1.0
    )
    assert result.ratio == pytest.approx(400 / own)
    assert result.low == pytest.approx(400 / own, rel=1e-5)
    assert result.high == pytest.approx(400 / own, rel=1e-5)
    assert not result.notes


def test_the_lack_of_fit_interval_ends_where_students_t_does():
  """At its ends the variant is exactly t standard errors from the line's prediction.

  That is the definition: |y0 - line(x)| = t s sqrt(1 + 1/n + (x - mean)^2 / Sxx).
  """
  x = np.log([1e13, 1e14, 1e15, 1e16, 1e17])
  y = np.array([1.6, 1.36, 1.07, 0.85, 0.6])
  target, l_inf = 0.95, 1.2
  result = speedup.against_baseline(
    np.exp(x),
    np.exp(y) + l_inf,
    variant_compute=1e14,
    variant_loss=math.exp(target) + l_inf,
    l_inf=l_inf,
    level=0.9,
  )
  line = np.polynomial.Polynomial.fit(x, y, 1)
  s = math.sqrt(np.sum((y - line(x)) ** 2) / 3)
  t = stats.t.ppf(0.95, 3)
  for end in (result.low, result.high):
    at = math.log(end * 1e14)
    error = s * math.sqrt(1 + 1 / 5 + (at - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2))
    assert abs(target - line(at)) == pytest.approx(t * error, rel=1e-6)
  assert result.low < result.ratio < result.high
  assert "3 degrees of freedom" in result.how


def test_a_slope_that_noise_could_make_gives_no_bound():
  """Three scattered runs: alpha is not told from 0, so C_needed may be anything."""
  result = speedup.against_baseline(
    [1e13, 1e14, 1e15], [3.0, 2.5, 2.9], variant_compute=1e14, variant_loss=2.2, l_inf=1
  )
  assert (result.low, result.high) == (0, math.inf)
  assert any("no upper bound" in note for note in result.notes)
  assert any("outside the baseline's" in note for note in result.notes)


def curve(loss, cost=None) -> curves.Curve:
  loss = np.asarray(loss, float)
  cost = np.arange(1.0, len(loss) + 1) if cost is None else np.asarray(cost, float)
  return curves.Curve(cost=cost, loss=loss)


def test_smoothing_pools_a_rise_with_what_precedes_it():
  """4, 2, 3, 1: the rise from 2 to 3 becomes their mean, the rest stays."""
  np.testing.assert_allclose(curves.smooth([4, 2, 3, 1]), [4, 2.5, 2.5, 1])


def test_smoothing_keeps_the_height_of_a_turn():
  """Falling to 1 and rising to 4: a fit that only falls would end at their mean, 2.6."""
  np.testing.assert_allclose(curves.smooth([5, 3, 1, 2, 3, 4]), [5, 3, 1, 1, 1, 1])
  # The same fit by brute force: the best split into a falling and a rising part.
  values = np.array([5, 4.4, 4.6, 2, 2.2, 1.5, 3, 2.6, 3.5])

  def error(part, increasing):
    if not len(part):
      return 0.0
    fit = optimize.isotonic_regression(part, increasing=increasing).x
    return float(np.sum((part - fit) ** 2))

  errors = [error(values[:k], False) + error(values[k:], True) for k in range(1, 10)]
  end = 1 + int(np.argmin(errors))
  expected = optimize.isotonic_regression(values[:end], increasing=False).x
  np.testing.assert_allclose(curves.smooth(values)[:end], expected)


def test_cost_to_interpolates_between_points():
  """From 4 at cost 10 to 2 at cost 20: 3 is half way."""
  falling = curve([4, 2, 1], [10, 20, 30])
  assert curves.cost_to(falling, 3) == 15
  assert curves.cost_to(falling, 5) == 10
  assert curves.cost_to(falling, 0.5) == math.inf


def test_speed_to_quality_by_hand():
  """The baseline ends at 2 after 4 steps; the variant passes 2 half way from 1 to 2."""
  result = speedup.to_quality([curve([5, 4, 3, 2])], [curve([3, 1, 0.5, 0.4])])
  assert result.target == 2
  assert result.ratio == pytest.approx(4 / 1.5)
  assert math.isnan(result.low)


def test_time_is_steps_scaled_by_each_sides_own_step_time():
  """A step of the variant takes twice as long: half the speedup."""
  slow, fast = curve([5, 4, 3, 2]), curve([3, 1, 0.5, 0.4], [2, 4, 6, 8])
  assert speedup.to_quality([slow], [fast]).ratio == pytest.approx(4 / 3)


def test_a_variant_that_never_gets_there_has_an_upper_bound_only():
  """It ran 4 steps without reaching what the baseline has at 4: below 1x."""
  result = speedup.to_quality([curve([5, 4, 3, 2])], [curve([5, 4, 3, 2.5])])
  assert result.ratio == 0
  assert result.notes[0] == "the variant never reaches 2: its speedup is below 1"


STEPS = np.arange(1, 101.0)


def test_the_interval_of_speed_to_quality_is_students_t_of_the_log_ratio():
  """Pairs of 1.5x, 2.5x, 1.8x and 2.2x, around the ratio of the mean curves, 2x.

  The baseline is at cost 100 at 2; a seed of factor f passes 2 at 100 / f.
  """
  factors = (1.5, 2.5, 1.8, 2.2)
  baseline = [curve(5 - 0.03 * STEPS)] * 4
  variant = [curve(5 - 0.03 * factor * STEPS) for factor in factors]
  result = speedup.to_quality(baseline, variant)
  assert result.ratio == pytest.approx(2, rel=1e-6)
  width = stats.t.ppf(0.95, 3) * np.std(np.log(factors), ddof=1) / math.sqrt(4)
  assert result.low == pytest.approx(2 * math.exp(-width))
  assert result.high == pytest.approx(2 * math.exp(width))
  assert result.how == "Student t of the log ratio, 3 degrees of freedom"


def test_what_a_seed_adds_to_both_sides_cancels_in_pairs_only():
  """Offsets of +-0.5 on both sides leave no spread; on one side, or unpaired, they do."""
  offsets = (0.5, -0.5, 0.0)
  slow = [curve(5 - 0.03 * STEPS + o) for o in offsets]
  fast = [curve(5 - 0.06 * STEPS + o) for o in offsets]
  paired = speedup.to_quality(slow, fast)
  assert (paired.low, paired.high) == pytest.approx((2, 2))
  lone = speedup.to_quality([curve(5 - 0.03 * STEPS)] * 3, fast)
  assert lone.low < 1.7 < 2.3 < lone.high
  unequal = speedup.to_quality(slow, fast[:2])
  assert unequal.low < 1.7 < 2.3 < unequal.high


@pytest.mark.parametrize("num_seeds", [(2, 2), (3, 3), (3, 2)])
def test_the_interval_of_speed_to_quality_covers_the_truth(num_seeds):
  """Curves that differ by a seed's offset and by noise; the truth is 1.5x exactly.

  Of 100 sweeps a nominal 90% interval holds it in at least 85: a binomial of 0.9 falls
  below that in 4% of seeds, and these are fixed. A bootstrap over 3 seeds holds it in 74.
  """
  cost, covered = np.arange(15, 301, 15.0), 0

  def draw(rng, rate, number):
    for _ in range(number):
      noise = 0.03 * rng.normal() + 0.01 * rng.normal(size=cost.shape)
      yield curve(3 + 20 / np.sqrt(rate * cost) + noise, cost)

  for trial in range(100):
    rng = np.random.default_rng(trial)
    slow, fast = (list(draw(rng, r, n)) for r, n in zip((1.0, 1.5), num_seeds))
    result = speedup.to_quality(slow, fast)
    covered += result.low <= 1.5 <= result.high
  assert covered >= 85


def test_a_target_that_is_passed_before_the_first_point_gives_a_bound():
  """After 10 of 100 steps the variant is below the baseline's end: 10x or more."""
  slow = [curve([5, 4, 3], [10, 50, 100])] * 2
  result = speedup.to_quality(slow, [curve([2, 1.5], [10, 20])] * 2)
  assert (result.ratio, result.bound) == (10, speedup.AT_LEAST)
  assert (result.low, result.high) == (10, math.inf)
  assert "2 of 2 seeds reach the target before their first evaluation" in result.notes[-1]
  # Exactly there at the first point is no bound.
  assert not speedup.to_quality(slow, [curve([3, 2], [10, 20])] * 2).bound
  rises = [curve([2, 3, 4], [10, 50, 100])]
  assert speedup.to_quality(rises, [curve([5, 3], [10, 20])]).bound == speedup.AT_MOST
  assert speedup.to_quality(rises, [curve([3, 2], [10, 20])]).bound == speedup.UNKNOWN


def test_a_variant_that_passes_the_target_and_rises_has_passed_it():
  """It is at 2 after 20 of 40 steps; what comes later does not undo that."""
  slow = [curve([5, 4, 3, 2], [10, 20, 30, 40])]
  result = speedup.to_quality(slow, [curve([4, 2, 2.8, 2.9], [10, 20, 30, 40])])
  assert result.ratio == 2
  assert "passes 2 and ends above it, 2.9" in result.notes[0]


def test_the_target_is_the_mean_of_what_seeds_end_with():
  """A baseline that rises ends at 3.5 and 3.7, and was there on its way down.

  From 5 at cost 10 to 3 at cost 20, 3.6 is at cost 17; its own end would be 40.
  """
  slow = [curve([5, 3, 3.2, e], [10, 20, 30, 40]) for e in (3.5, 3.7)]
  result = speedup.to_quality(slow, [curve([4.6, 2.6], [10, 20])] * 2)
  assert result.target == pytest.approx(3.6)
  assert result.ratio == pytest.approx(17 / 15)


def test_a_seed_that_never_gets_there_leaves_no_lower_bound():
  """One seed of three ends above the target: the mean is there, and low is 0."""
  slow = [curve([5, 4, 3, 2])] * 3
  fast = [curve([4, 2, 1, 0.5]), curve([4, 2, 1, 0.4]), curve([4, 3, 2.5, 2.1])]
  result = speedup.to_quality(slow, fast)
  assert result.ratio > 1 and result.low == 0 and math.isfinite(result.high)
  assert "1 of 3 seeds never reach the target: no lower bound" in result.notes


def test_noise_of_single_batches_hardly_moves_the_ratio():
  """Losses of single steps scatter by 0.05; a first crossing would be far too early."""
  steps, rng = np.arange(1, 2001.0), np.random.default_rng(0)

  def noisy(rate):
    return curve(2 + 3 * np.exp(-steps * rate) + rng.normal(0, 0.05, steps.shape))

  result = speedup.to_quality(
    [noisy(1 / 1000) for _ in range(3)],
    [noisy(2 / 1000) for _ in range(3)],
    target=3.0,
  )
  assert result.ratio == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: speedup.effective(2, 1.5, l_inf=1.6, alpha=0.1), "l_inf=1.6 is not below"),
    (lambda: speedup.effective(2, 1.5, l_inf=1, alpha=0), "alpha=0"),
    (lambda: speedup.to_quality([], [curve([1])]), "baseline has no loss curve"),
    (lambda: speedup.to_quality([curve([2, 1], [2, 1])], [curve([1])]), "must increase"),
    (lambda: speedup.to_quality([curve([2, 1])], [curve([1])], target=0.5), "target=0.5"),
    (
      lambda: speedup.to_quality([curve([2], [1]), curve([2], [3])], [curve([1])]),
      "no cost in common",
    ),
    (
      lambda: speedup.against_baseline(
        [1, 2], [3, 2], variant_compute=1, variant_loss=2, l_inf=1
      ),
      "at least 3 runs",
    ),
    (
      lambda: speedup.against_baseline(
        [1, 2, 3], [2, 3, 4], variant_compute=1, variant_loss=2, l_inf=1
      ),
      "does not fall with compute",
    ),
  ],
)
def test_what_has_no_speedup_is_refused_in_one_sentence(call, words):
  with pytest.raises(UserError, match=words):
    call()
