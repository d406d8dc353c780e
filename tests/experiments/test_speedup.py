"""The speed-up experiment's arithmetic, by hand."""

import pytest

from experiments.speedup import run


def curve(losses, seconds):
  return {"step": [10, 20, 30], "loss": losses, "seconds_per_step": seconds}


def test_speedup_is_dense_over_moe_in_steps_and_in_time():
  """Dense ends at 2.0; MoE has 2.0 halfway from step 10 (2.5) to 20 (1.5): step 15."""
  result = run.compare(
    {"moe": curve([2.5, 1.5, 1.2], 1.5), "dense": curve([3, 2.5, 2], 1)}
  )
  assert result["moe_step_at_dense_loss"] == 15
  assert result["speedup_steps"] == pytest.approx(2.0)
  assert result["speedup_seconds"] == pytest.approx(2.0 / 1.5)
  assert "2.00x fewer steps" in run.describe(result)


def test_not_reached_is_a_result():
  """A MoE model that stays above the dense one has no speed-up, and says so."""
  result = run.compare({"moe": curve([4, 3, 2.5], 1), "dense": curve([3, 2.5, 2], 1)})
  assert result["speedup_steps"] is None and "Not reached" in run.describe(result)


def test_a_first_evaluation_below_the_target_counts_as_its_step():
  """Nothing is extrapolated before the first evaluation."""
  assert run.first_reached([10, 20], [1.0, 0.9], 2.0) == 10
