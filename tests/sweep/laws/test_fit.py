"""Fits: known constants come back, intervals cover, and thin data is refused or said."""

import warnings
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from moejax.errors import UserError
from moejax.sweep.laws import fit, isoflop, resample
from moejax.sweep.laws import published as laws
from moejax.sweep.laws.law import OutsideFittedRange

TRUE = laws.PowerLaw(l_inf=1.2, a=60.0, alpha=0.12)
COMPUTE = np.logspace(13, 17, 12)


def noisy(law, inputs, sigma=0.003, seed=0):
  exact = np.asarray(law.formula(**inputs))
  return exact * np.exp(np.random.default_rng(seed).normal(0, sigma, exact.shape))


def grid(sizes=5):
  n, d = np.meshgrid(np.logspace(7, 9, sizes), np.logspace(8.5, 10.5, sizes))
  return {"N": n.ravel(), "D": d.ravel()}


@pytest.mark.parametrize(
  ("loss", "words"),
  [
    ([3.0] * 12, "does not fall with compute .losses 3 to 3."),
    (3 + 0.1 * np.arange(12), "does not fall with compute"),
    (3 + 0.05 * np.random.default_rng(1).normal(size=12), "does not fall significantly"),
  ],
)
def test_losses_without_a_trend_have_no_power_law(loss, words):
  """Flat, rising, and pure noise: some alpha fits each of them as well as any other."""
  with pytest.raises(UserError, match=words):
    fit.power_law(COMPUTE, loss, evaluation="x", num_draws=0)


def test_noise_alone_is_refused_at_the_level_of_the_test():
  """5% of noises look like a trend or a curve; of 200, at most 10% here."""
  rng = np.random.default_rng(0)
  trends = curves = 0
  budget, sizes = np.full(6, 1e13), np.logspace(6, 8, 6)
  for _ in range(200):
    try:
      fit._refuse_no_trend(COMPUTE, 3 + 0.05 * rng.normal(size=len(COMPUTE)))
      trends += 1
    except UserError:
      pass
    curves += len(isoflop.minima(budget, sizes, 3 + 0.01 * rng.normal(size=6))[0])
  assert trends <= 20 and curves <= 20


def test_a_curvature_within_the_scatter_is_refused_with_its_t():
  """By hand: x = -2..2, residuals (1, -2, 0, 2, -1) d are orthogonal to 1, x and x^2.

  Two degrees of freedom, sum of squares 10 d^2; the quadratic's variance is 1/14 of s^2.
  With 0.05 x^2, d = 0.05: s = 0.05 sqrt(5), t = 0.05 sqrt(14) / s = 1.67 < 2.92.
  """
  x, shape = np.arange(-2, 3.0), np.array([1, -2, 0, 2, -1])
  sizes = np.exp(x + 14)
  (found,), _ = isoflop.minima(np.full(5, 1e13), sizes, 3 + 0.05 * x**2 + 0.001 * shape)
  assert found.curvature == pytest.approx(0.1)
  loss = 3 + 0.05 * x**2 + 0.05 * shape
  _, (refused,) = isoflop.minima(np.full(5, 1e13), sizes, loss)
  assert "t=1.7, and 2.9 is needed" in refused.why


def test_runs_without_compute_are_refused():
  """A power of 0 is infinite: no warning of numpy's, but a sentence."""
  with pytest.raises(UserError, match="C=0: it must be above 0"):
    fit.power_law([0.0, *COMPUTE], np.ones(len(COMPUTE) + 1), evaluation="x")


def test_a_power_law_comes_back_from_noisy_runs_within_its_own_interval():
  loss = noisy(TRUE, {"C": COMPUTE})
  fitted = fit.power_law(COMPUTE, loss, evaluation="validation", num_draws=100)
  for name, (low, high) in fitted.intervals.items():
    assert low <= getattr(TRUE, name) <= high, name
    assert low <= fitted.law.constants[name] <= high, name
  assert fitted.error < 0.004
  assert fitted.r2 > 0.999
  assert isinstance(fitted.law, laws.PowerLaw)
  assert fitted.law.evaluation == "validation"


@pytest.mark.parametrize(
  ("law", "fixed", "tolerance"),
  [
    (laws.Chinchilla(), {}, 1e-3),
    (laws.Krajewski(), {}, 1e-2),
    (laws.Clark(), {}, 1e-2),
    (laws.Abnar(), {}, 1e-2),
    (laws.Ludziejewski(), {"e_start": 2.0732, "e_max": 290.4521}, 1e-2),
  ],
  ids=lambda value: type(value).__name__,
)
def test_exact_losses_give_back_the_constants_from_a_grid_without_them(
  law, fixed, tolerance
):
  """Starts far from the solution find it; the published constants are not a start."""
  third = next((n for n in ("E", "G", "S") if n in law.inputs()), None)
  inputs = grid(4)
  if third:
    values = np.array([1.0, 2, 4, 8, 16, 32])
    values = 1 - 1 / values if third == "S" else values
    inputs = {name: np.tile(v, len(values)) for name, v in inputs.items()}
    inputs[third] = np.repeat(values, 16)
  inputs = {name: v for name, v in inputs.items() if name in law.inputs()}
  found = fit.fit(
    type(law), inputs, law.formula(**inputs), fixed=fixed, num_draws=0, published=False
  )
  assert found.error < 1e-5
  for name, value in law.constants.items():
    assert found.law.constants[name] == pytest.approx(value, rel=tolerance), name


def test_without_outliers_the_fit_is_scipys_curve_fit_of_log_loss():
  """With a threshold far above the residuals, Huber is least squares."""
  inputs = grid()
  loss = noisy(laws.Chinchilla(), inputs)
  ours = fit.fit(laws.Chinchilla, inputs, loss, delta=10.0, num_draws=0)

  def log_loss(x, e, log_a, alpha, log_b, beta):
    n, d = x
    return np.log(e + np.exp(log_a) * n**-alpha + np.exp(log_b) * d**-beta)

  start = (1.7, np.log(400), 0.34, np.log(400), 0.28)
  theirs, _ = optimize.curve_fit(
    log_loss, (inputs["N"], inputs["D"]), np.log(loss), start, maxfev=10_000
  )
  constants = ours.law.constants
  assert constants["e"] == pytest.approx(theirs[0], rel=1e-3)
  assert constants["alpha"] == pytest.approx(theirs[2], rel=1e-3)
  assert constants["beta"] == pytest.approx(theirs[4], rel=1e-3)


def test_with_l_inf_pinned_the_fit_is_a_line_in_log_space():
  """Numpy's polyfit of ln L over ln C, when l_inf is 0."""
  loss = noisy(laws.PowerLaw(a=60.0, alpha=0.12), {"C": COMPUTE})
  ours = fit.power_law(COMPUTE, loss, evaluation="x", l_inf=0.0, delta=10.0, num_draws=0)
  slope, intercept = np.polyfit(np.log(COMPUTE), np.log(loss), 1)
  assert ours.law.constants["alpha"] == pytest.approx(-slope, rel=1e-6)
  assert ours.law.constants["a"] == pytest.approx(np.exp(intercept), rel=1e-5)
  assert ours.fixed == ("l_inf",)
  assert ours.num_parameters == 2


def test_huber_ignores_a_diverged_run_that_least_squares_follows():
  """One loss 30% too high: with the small threshold alpha stays, with a large one not."""
  loss = noisy(TRUE, {"C": COMPUTE}, sigma=0.001)
  loss[-1] *= 1.3
  options: dict[str, Any] = dict(evaluation="x", l_inf=1.2, num_draws=0)
  robust = fit.power_law(COMPUTE, loss, delta=1e-3, **options).law.constants["alpha"]
  plain = fit.power_law(COMPUTE, loss, delta=10.0, **options).law.constants["alpha"]
  assert abs(robust - 0.12) < 0.002 < 0.01 < abs(plain - 0.12)


def test_seeds_of_a_setting_are_one_point_and_are_held_out_together():
  """Three seeds at 12 budgets are 12 points in 36 rows, whatever their order."""
  compute = np.tile(COMPUTE, 3)
  loss = noisy(TRUE, {"C": compute})
  fitted = fit.power_law(compute, loss, evaluation="x", num_draws=0)
  assert (fitted.num_rows, fitted.num_points) == (36, 12)
  folds, largest = fitted.held_out
  assert (folds.num_points, largest.num_points) == (12, 1)
  assert largest.how == f"C above {COMPUTE[-2]:.3g}"


def test_held_out_error_sees_a_wrong_law_that_the_fitted_error_hides():
  """A broken power law fits below the break; only the largest C shows it."""
  loss = TRUE.formula(C=COMPUTE)
  loss[-1] *= 0.95
  fitted = fit.power_law(COMPUTE, loss, evaluation="x", l_inf=1.2, num_draws=0)
  assert fitted.held_out[1].error == pytest.approx(-np.log(0.95), rel=0.05)
  assert fitted.error < fitted.held_out[1].error / 3


def test_a_fitted_law_warns_outside_of_its_runs_and_its_interval_widens_there():
  loss = noisy(TRUE, {"C": COMPUTE})
  fitted = fit.power_law(COMPUTE, loss, evaluation="x", num_draws=60)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    fitted.law.predict(C=COMPUTE)
  with pytest.warns(OutsideFittedRange, match="C = 1e[+]20"):
    far = fitted.law.predict(C=1e20)
  low, high = fitted.interval(C=[1e15, 1e20])
  assert low[1] < far < high[1]
  assert high[1] - low[1] > 3 * (high[0] - low[0])


def test_equal_seeds_give_equal_intervals():
  loss = noisy(TRUE, {"C": COMPUTE})
  one, two, other = (
    fit.power_law(
      COMPUTE, loss, evaluation="x", l_inf=1.2, num_draws=20, seed=s
    ).intervals
    for s in (0, 0, 1)
  )
  assert one == two
  assert one != other


def test_constants_that_the_runs_do_not_determine_are_named():
  """All runs with 8 experts say nothing about what E does."""
  inputs = {**grid(4), "E": 8.0}
  loss = noisy(laws.Ludziejewski(), {k: np.asarray(v) for k, v in inputs.items()})
  fitted = fit.fit(laws.Ludziejewski, inputs, loss, num_draws=0)
  assert any("do not distinguish" in note and "delta" in note for note in fitted.notes)


def test_an_l_inf_of_zero_is_said_not_left_at_a_tiny_number():
  """A law without offset: l_inf goes to 0, where its logarithm is free."""
  loss = laws.PowerLaw(a=60.0, alpha=0.12).formula(C=COMPUTE) - 0.02
  fitted = fit.power_law(COMPUTE, loss, evaluation="x", num_draws=0)
  assert fitted.law.constants["l_inf"] < 1e-3
  assert any(n.startswith("l_inf = ") and "no effect" in n for n in fitted.notes)


def test_few_points_take_wider_quantiles_as_students_t_does():
  """The expanded percentile interval of 6 points and 2 constants: 5% becomes 0.45%.

  Student's t of 4 degrees of freedom is 2.132 at 95%; times sqrt(6/4) is 2.611, below
  which a normal variable has 1 - 0.00452.
  """
  low, high = resample.tails_of(0.9, 6, 4, by_points=True)
  assert low == pytest.approx(0.00452, abs=2e-5)
  assert high == 1 - low
  assert resample.tails_of(0.9, 10**6, 10**6 - 2, by_points=True)[0] == pytest.approx(
    0.05, 1e-3
  )


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (
      lambda: fit.fit(laws.Chinchilla, grid(2), [3.0] * 4),
      "5 free.* 4 distinct",
    ),
    (lambda: fit.fit(laws.Chinchilla, {"N": [1.0]}, [3.0]), "also needs D"),
    (lambda: fit.fit(laws.Chinchilla, {**grid(), "N": [1.0]}, [3.0] * 25), "N has"),
    (lambda: fit.fit(laws.Chinchilla, grid(), [3.0] * 24 + [-1.0]), "loss=-1"),
    (
      lambda: fit.fit(laws.Chinchilla, grid(), [3.0] * 25, fixed={"alfa": 1.0}),
      "Did you mean alpha",
    ),
    (lambda: fit.power_law(COMPUTE, COMPUTE, evaluation=""), "name the evaluation"),
    (
      lambda: fit.power_law(COMPUTE, [2.0] * 12, evaluation="x", l_inf=2.5),
      "l_inf=2.5: .*below the lowest measured loss, 2",
    ),
    (
      lambda: fit.fit(laws.Chinchilla, grid(), [3.0] * 25, resample="seeds"),
      "choose points or residuals",
    ),
  ],
)
def test_what_cannot_be_fitted_is_refused_in_one_sentence(call, words):
  with pytest.raises(UserError, match=words):
    call()


BUDGETS = np.array([1e17, 1e18, 1e19, 1e20])


def isoflop_runs(sizes=7, span=4.0, sigma=0.0):
  """Runs of Chinchilla's law around its own optimum at each budget."""
  law, rng = laws.Chinchilla(), np.random.default_rng(0)
  best = np.array([law.optimum(c).N for c in BUDGETS])
  n = best[:, None] * np.geomspace(1 / span, span, sizes)
  c = np.broadcast_to(BUDGETS[:, None], n.shape)
  loss = law.formula(N=n, D=c / (6 * n)) * np.exp(rng.normal(0, sigma, n.shape))
  return c.ravel(), n.ravel(), loss.ravel()


def test_approach_2_finds_the_minima_and_the_exponent_of_a_chinchilla_law():
  """N* = k C^(beta/(alpha+beta)): 0.28 / 0.62 = 0.4516."""
  found = isoflop.approach_2(*isoflop_runs())
  law = laws.Chinchilla()
  assert found.exponent == pytest.approx(0.28 / 0.62, abs=2e-3)
  for minimum in found.minima:
    assert pytest.approx(law.optimum(minimum.budget).N, rel=0.05) == minimum.N
    assert minimum.loss == pytest.approx(law.optimum(minimum.budget).loss, rel=1e-3)
    x = np.log(minimum.N)
    assert np.polynomial.polynomial.polyval(x, minimum.coefficients) == pytest.approx(
      minimum.loss
    )
    assert minimum.curvature > 0
  assert found.best_n(1e18) == pytest.approx(found.minima[1].N, rel=0.01)


def test_approach_2s_interval_holds_the_exponent_under_noise():
  found = isoflop.approach_2(*isoflop_runs(sigma=0.002), num_draws=200)
  low, high = found.interval
  assert low < 0.28 / 0.62 < high
  assert low < found.exponent < high
  assert high - low < 0.2


def test_approaches_2_and_3_agree_on_the_same_runs():
  c, n, loss = isoflop_runs()
  third = isoflop.approach_3(n, c / (6 * n), loss, num_draws=0)
  second = isoflop.approach_2(c, n, loss, num_draws=0)
  assert third.exponent == pytest.approx(second.exponent, abs=5e-3)
  assert third.best_n(1e18) == pytest.approx(laws.Chinchilla().optimum(1e18).N, rel=1e-2)


def test_a_minimum_on_the_edge_is_refused_with_the_side_to_extend():
  """Only the sizes above the optimum ran at the first budget."""
  c, n, loss = isoflop_runs()
  keep = (c > 1e17) | (n > laws.Chinchilla().optimum(1e17).N * 1.05)
  found = isoflop.approach_2(c[keep], n[keep], loss[keep])
  assert [m.budget for m in found.minima] == [1e18, 1e19, 1e20]
  assert found.refused[0].budget == 1e17
  assert "edge" in found.refused[0].why and "add smaller sizes" in found.refused[0].why


def test_budgets_within_two_percent_are_one():
  """An isoFLOP sweep meets its budgets within 1%, on either side."""
  c, n, loss = isoflop_runs()
  wobble = 1 + 0.009 * np.random.default_rng(0).uniform(-1, 1, c.shape)
  found, refused = isoflop.minima(c * wobble, n, loss)
  assert len(found) == 4 and not refused


@pytest.mark.parametrize(
  ("pick", "words"),
  [
    (lambda c, n, y: (c[:7], n[:7], y[:7]), "1 budgets have a minimum"),
    (lambda c, n, y: (c, n, -y), "loss: every value"),
    (lambda c, n, y: (c, n, y[:3]), "one value per run"),
    (lambda c, n, y: (c[::4], n[::4], y[::4]), "a parabola needs 3"),
  ],
)
def test_isoflop_runs_without_enough_minima_are_refused(pick, words):
  with pytest.raises(UserError, match=words):
    isoflop.approach_2(*pick(*isoflop_runs()))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["points", "residuals"])
def test_the_interval_covers_in_most_of_40_synthetic_sweeps(how):
  """90% intervals of 6 runs hold alpha in at least 31 of 40: 1% of true 90% ones fail."""
  compute = np.logspace(13, 16, 6)
  hits = 0
  for seed in range(40):
    loss = noisy(TRUE, {"C": compute}, sigma=0.005, seed=seed)
    fitted = fit.power_law(
      compute, loss, evaluation="x", l_inf=1.2, resample=how, seed=seed
    )
    low, high = fitted.intervals["alpha"]
    hits += low <= TRUE.alpha <= high
  assert hits >= 31
