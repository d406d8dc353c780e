"""Alarms over hand-made series: when one is raised, when it ends, and what it says."""

import dataclasses
import math

import numpy as np
import pytest

from moejax.alarms import history
from moejax.alarms.rules import RULES, thresholds
from moejax.alarms.watch import Watch, unavoidable_drops
from moejax.config import AlarmConfig, Config
from moejax.config import router as config_router

NAMES = [rule.name for rule in RULES]


def make_watch(config: Config | None = None, layers=(1, 3)) -> Watch:
  config = config or Config()
  router = config_router.make_router(config.moe)
  return Watch(config, [router] * len(layers), layers)


def quiet(**others) -> dict[str, np.ndarray]:
  """Numbers that raise no alarm, apart from those given."""
  found = {
    name: np.full(1 if name == "max_aux_share" else 2, 1.0 if "min" in name else 0.0)
    for name in NAMES
  }
  return found | {name: np.asarray(value, np.float64) for name, value in others.items()}


def feed(watch: Watch, name: str, series) -> list[tuple[int, str]]:
  """What is said at which step, for one alarm's number of layer 3."""
  said = []
  for step, value in enumerate(series, 1):
    values = [value] if name == "max_aux_share" else [watch_safe(name), value]
    said += [(step, text) for text in watch.take(step, quiet(**{name: values}))]
  return said


def watch_safe(name: str) -> float:
  """A number that is well inside, for the other layer."""
  return 1e2 if name.startswith("min_") else 0.0


def series_of(name: str) -> tuple[float, float, float]:
  """A number beyond the threshold, one between it and the release, one well inside."""
  limit = thresholds(Config())[name]
  if name.startswith("min_"):
    return limit / 2, limit * 1.05, limit * 2
  return limit * 1.5, limit * 0.95, limit / 2


def test_every_threshold_is_an_alarm_and_the_other_way_round():
  """No field of the section is without a rule, so that no flag does nothing."""
  fields = {field.name for field in dataclasses.fields(AlarmConfig)}
  assert fields - {"patience", "release"} == set(NAMES) == set(thresholds(Config()))


@pytest.mark.parametrize("name", NAMES)
def test_an_alarm_needs_patience_and_ends_only_well_inside(name):
  """Four bad steps and a good one say nothing; five do; the edge does not end it.

  The alarm names its step, the layer of the model, its flag and a remedy's flag.
  """
  watch = make_watch()
  bad, edge, good = series_of(name)
  if name == "max_dead_steps":  # Its number counts steps already.
    said = feed(watch, name, [good, bad, bad, edge, good, good])
    raised, cleared = 2, 5
  else:
    said = feed(watch, name, [bad] * 4 + [good] + [bad] * 7 + [edge] * 3 + [good] * 2)
    raised, cleared = 10, 16
  assert [step for step, _ in said] == [raised, cleared]
  alarm, clear = (text for _, text in said)
  assert alarm.startswith(f"ALARM {name} at step {raised}: ")
  assert f"--config.alarms.{name}=" in alarm
  assert alarm.count("--config.") > 1
  assert ("layer 3: " in alarm) == (name != "max_aux_share")
  assert clear.startswith(f"Alarm {name} cleared at step {cleared}: ")
  assert "\n" not in alarm + clear
  assert watch.raised == 1 and not watch.active


def test_while_raised_the_number_and_layer_of_the_worst_layer_are_kept():
  watch = make_watch()
  for step in range(1, 8):
    watch.take(step, quiet(max_load=[0.7, 0.6 + step / 100]))
  assert watch.active == {"max_load": {"value": 0.7, "layer": 1}}
  watch.take(8, quiet(max_load=[0.7, 0.9]))
  assert watch.active == {"max_load": {"value": 0.9, "layer": 3}}


def test_a_resumed_run_counts_on_and_no_alarm_twice():
  """Three before, max_load among them: raised anew it is the same, later another one."""
  watch = make_watch()
  watch.go_on({"alarms_raised": 3, "alarms": {"max_load": {"value": 0.9, "layer": 3}}})
  assert watch.raised == 3 and not watch.active
  feed(watch, "max_load", [0.9] * 5)
  assert watch.raised == 3 and list(watch.active) == ["max_load"]
  feed(watch, "max_load", [0.0, *[0.9] * 5])
  assert watch.raised == 4
  watch = make_watch()
  watch.go_on({"alarms_raised": 4, "alarms": {"max_load": {}}})
  feed(watch, "max_load", [0.0, *[0.9] * 5])  # Over before the alarm of the next one.
  assert watch.raised == 5


def test_none_turns_an_alarm_off_and_nan_raises_none():
  config = Config()
  config.alarms.max_load = None
  watch = make_watch(config)
  nan = [math.nan, math.nan]
  for step in range(20):
    assert not watch.take(step, quiet(max_load=[1, 1], max_gate=nan))
  assert watch.raised == 0


@pytest.mark.parametrize(
  ("router", "flag"),
  [
    ("switch", "--config.moe.balance_weight (now 0.01)"),
    ("sigmoid_bias", "--config.moe.sigmoid_bias.bias_update_rate (now 0.001)"),
    ("quantile_bias", "--config.moe.quantile_bias.quantile_rate (now 0.2)"),
    ("quantile_balancing", "--config.optimizer.learning_rate"),
    ("hash", "--config.moe.router"),
  ],
)
def test_the_remedy_against_collapse_is_that_of_the_router(router, flag):
  config = Config()
  config.moe.use_router(router)
  [alarm] = [text for _, text in feed(make_watch(config), "max_load", [1.0] * 6)]
  assert flag in alarm


@pytest.mark.parametrize(
  ("router", "remedy"),
  [
    ("switch", "or raise --config.moe.balance_weight (now 0.01)."),
    ("hash", "or use another --config.moe.router: hash does not learn."),
  ],
)
def test_the_remedy_against_drops_is_one_sentence(router, remedy):
  config = Config()
  config.moe.use_router(router)
  [alarm] = [text for _, text in feed(make_watch(config), "max_drops", [1.0] * 6)]
  assert alarm.endswith(f"Raise --config.moe.capacity_factor (now 1.25), {remedy}")


def test_a_small_capacity_makes_drops_unavoidable():
  """Half the slots hold half of the assignments; per token of two choices, a quarter."""
  config = Config()
  config.moe.capacity_factor = 0.5
  assert unavoidable_drops(config) == 0.5
  config.moe.capacity_convention = "per_token"
  config.moe.router, config.moe.num_selected = "top_k", 2
  assert unavoidable_drops(config) == 0.75
  config.moe.capacity_factor = None
  assert unavoidable_drops(config) == 0.0


def test_an_alarm_over_a_resume_is_one_span():
  """Not raised in the first line of a new start, and not counted when it is raised
  anew; one that begins then is."""
  lines = [
    {"step": 1, "alarms_active": 1, "alarms_raised": 1, "alarms": {"max_load": {}}},
    {"step": 2, "alarms_active": 0, "alarms_raised": 1},
    {"step": 3, "alarms_active": 1, "alarms_raised": 2, "alarms": {"max_gate": {}}},
    {"step": 4, "alarms_active": 0, "alarms_raised": 2},
    {
      "step": 5,
      "alarms_active": 3,
      "alarms_raised": 4,
      "alarms": {"max_load": {}, "max_gate": {}, "max_drops": {}},
    },
  ]
  assert history.spans(lines) == {
    "max_load": [(1, 2), (5, None)],
    "max_gate": [(3, None)],
    "max_drops": [(5, None)],
  }


def test_history_reads_the_log_of_all_starts():
  """Raised twice, the second time to the end; lines of evaluations alone do not count."""
  lines = [
    {"step": 10, "alarms_active": 0},
    {"step": 20, "alarms_active": 1, "alarms": {"max_load": {}}},
    {"step": 25, "validation_loss": 1.0},
    {"step": 30, "alarms_active": 2, "alarms": {"max_load": {}, "max_gate": {}}},
    {"step": 40, "alarms_active": 0},
    {"step": 50, "alarms_active": 1, "alarms": {"max_load": {}}},
  ]
  found = history.spans(lines)
  assert found is not None and found == {
    "max_load": [(20, 40), (50, None)],
    "max_gate": [(30, 40)],
  }
  assert history.sentence(found) == (
    "max_load (steps 20 to 40, 50 to the end), max_gate (steps 30 to 40)"
  )
  assert history.sentence({}) == "none"
  assert history.spans([{"step": 1, "loss": 2.0}]) is None
