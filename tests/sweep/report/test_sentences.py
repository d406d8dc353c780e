"""A sentence is there if the data carry it, with their numbers, and else it is not."""

import shlex

import pytest

from moejax.config import Config
from moejax.config import text as config_text
from moejax.routing.registry import ROUTERS
from moejax.routing.token_choice import TopK
from moejax.sweep.report import sentences, summary
from tests.sweep.report import report_cases as cases


def write(runs, base=None):
  found = cases.of(runs)
  settings = summary.settings(found)
  return sentences.write(found, settings, summary.axes(settings, found.fields), base)


def topic(said, name):
  return [finding.text for finding in said.findings if finding.topic == name]


def test_one_run_says_nothing():
  """There is nothing to compare it with."""
  said = write([cases.record(3.0)])
  assert said.findings == () and said.unknown == ()


def test_the_pareto_sentence_lists_the_set_from_the_cheapest():
  """Of 3 settings, the slow one with the higher loss is beaten."""
  points = ((4, 10, 3.0), (8, 20, 2.5), (16, 30, 2.75))
  runs = []
  for e, ms, loss in points:
    runs += cases.seeds(loss, (-0.1, 0.1), step_ms=ms, moe__num_experts=e)
  assert topic(write(runs), "Loss against step time") == [
    "Of 3 settings, 2 are not beaten in mean loss at equal or lower step time, from the "
    "cheapest: num_experts=4 (10 ms, 3.0000 ± 0.1000); num_experts=8 (20 ms, 2.5000 ± "
    "0.1000)."
  ]


def test_equal_costs_are_no_trade():
  """Settings matched to 1% in FLOPs are not ranked by what is left of the difference."""
  runs = [
    cases.record(3.0, values={"training_flops": 1e12}, moe__num_experts=4),
    cases.record(2.0, values={"training_flops": 1.009e12}, moe__num_experts=8),
  ]
  assert topic(write(runs), "Loss against training FLOPs") == []
  runs[1].values["training_flops"] = 1.2e12  # pyright: ignore
  assert len(topic(write(runs), "Loss against training FLOPs")) == 1


def test_doubling_is_said_with_its_interval():
  """-0.5 in both seeds, for half as long again."""
  runs = [
    *cases.seeds(3.0, (0.0, 0.1), step_ms=10, moe__num_experts=4),
    *cases.seeds(2.5, (0.0, 0.1), step_ms=15, moe__num_experts=8),
  ]
  assert topic(write(runs), "Doubling the experts") == [
    "Going from 4 to 8 experts changes the loss by -0.5000 nats/token (90% interval "
    "-0.5000 to -0.5000, 2 seeds), and the step time by +50%."
  ]


def test_what_changes_with_the_experts_is_said():
  """Runs that differ in E and in the rate: the difference is not of E alone."""
  runs = [
    *cases.seeds(3.0, (0.0, 0.1), moe__num_experts=4, optimizer__learning_rate=0.1),
    *cases.seeds(2.5, (0.0, 0.1), moe__num_experts=8, optimizer__learning_rate=0.2),
  ]
  (text,) = topic(write(runs), "Doubling the experts")
  assert text.startswith(
    "Going from 4 to 8 experts (and learning_rate from 0.1 to 0.2) changes the loss by"
  )


def test_equal_runs_are_no_open_question_with_an_interval():
  """A tie is said in words."""
  runs = [
    *cases.seeds(3.0, (0.0, 0.1), moe__num_experts=4),
    *cases.seeds(3.0, (0.0, 0.1), moe__num_experts=8),
  ]
  assert any("(no difference in any of 2 seeds)" in t for t in write(runs).unknown)


def test_a_difference_that_may_be_nothing_is_unknown():
  """Seeds disagree on its sign: it is listed with its interval, and not as a finding."""
  runs = [
    *cases.seeds(3.0, (0.0, 0.0), step_ms=10, moe__num_experts=4),
    *cases.seeds(3.0, (0.1, -0.2), step_ms=15, moe__num_experts=8),
  ]
  said = write(runs)
  assert topic(said, "Doubling the experts") == []
  # Differences 0.1 and -0.2: mean -0.05, t(0.95, 1) = 6.3138 x 0.15.
  gap = "-0.0500 nats/token (90% interval -0.9971 to +0.8971, 2 seeds)"
  # Of two settings this is the question which is better, and is asked once.
  (text,) = said.unknown
  assert text.startswith("Whether num_experts=8 is better than num_experts=4 (+0.0500")
  runs += cases.seeds(4.0, (0.0, 0.0), moe__num_experts=32)
  assert f"Whether going from 4 to 8 experts changes the loss: {gap} includes 0." in (
    write(runs).unknown
  )
  # It has the lowest mean all the same, and the cheaper one may be as good.
  (best,) = topic(said, "Lowest loss")
  assert best.startswith("num_experts=8 has the lowest mean loss: 2.9500 ± 0.1500")
  assert "num_experts=4 cannot be distinguished from it, +0.0500" in best
  assert best.endswith("and takes 33% less time per step.")


def test_a_setting_without_all_seeds_is_not_ranked():
  """A mean of two seeds is lower by chance, though higher in both than the same seeds."""
  full = cases.seeds(3.0, (-0.2, -0.1, 0.6), moe__capacity_factor=1.0)
  short = cases.seeds(3.01, (-0.2, -0.1), moe__capacity_factor=2.0)
  said = write([*full, *short])
  (best,) = topic(said, "Lowest loss")
  assert best.startswith(
    "Only capacity_factor=1 has all 3 seeds, with a mean loss of 3.1"
  )
  (text,) = [text for text in said.unknown if "seeds rank" in text]
  assert "fewer than 3 seeds" in text and "capacity_factor=2 (2 seeds)" in text
  apart = [cases.record(3.0 - e / 100, seed=e, moe__num_experts=e) for e in (4, 8)]
  said = write(apart)
  assert any("none has both seeds" in text for text in said.unknown)
  assert topic(said, "Lowest loss") == []


def test_step_times_of_a_busy_machine_are_not_compared():
  """Equal work took 10 ms and 100 ms: no sentence or figure of time, and it says why."""
  runs = [
    *cases.seeds(3.0, (0.0, 0.1), step_ms=10, moe__num_experts=4),
    *cases.seeds(2.5, (0.0, 0.1), step_ms=15, moe__num_experts=8),
  ]
  assert topic(write(runs), "Loss against step time")
  runs[0].values["step_ms_p50"] = 100  # pyright: ignore
  said = write(runs)
  assert topic(said, "Loss against step time") == []
  (text,) = topic(said, "Doubling the experts")
  assert "step time" not in text and "-0.5000 nats/token" in text
  assert not any("less time" in finding.text for finding in said.findings)
  assert any("differ 10.0-fold between its seeds" in text for text in said.unknown)


def test_one_seed_claims_no_difference():
  """What is left is the order of the means, and the advice to add seeds."""
  said = write(cases.grid(num_seeds=1))
  assert topic(said, "Doubling the experts") == []
  assert topic(said, "Sufficient capacity") == []
  assert any(
    text.startswith("Every setting has one seed") and "--seeds=3" in text
    for text in said.unknown
  )


def test_capacity_is_said_per_expert_count():
  """Standard error 0.1: 2.05 is within it at E 4, and 2.5 is not at E 8."""
  runs = []
  for e, loss in ((4, 2.05), (8, 2.5)):
    both = {"moe__num_experts": e}
    runs += cases.seeds(2.0, (-0.1, 0.1), moe__capacity_factor=None, **both)
    runs += cases.seeds(loss, (-0.1, 0.1), moe__capacity_factor=1.25, **both)
  assert topic(write(runs), "Sufficient capacity") == [
    "From 1.25 on, every capacity factor tried has a loss (2.0500 at 1.25) within one "
    "standard error of dropless (2.0000 ± 0.1000), with num_experts=4. Seed by seed, it "
    "still differs: +0.0500 nats/token (90% interval +0.0500 to +0.0500, 2 seeds).",
    "The largest capacity factor tried, 1.25, has a loss more than one standard error "
    "above dropless (2.0000 ± 0.1000), with num_experts=8, so no smaller one is "
    "considered sufficient.",
  ]


def test_a_refused_minimum_is_unknown():
  """Loss still falls at the largest size."""
  runs = [
    cases.record(
      3 - i / 10, values={"active_parameters": 10**i}, model__width=32 * (i + 1)
    )
    for i in range(4)
  ]
  said = write(runs)
  assert topic(said, "Best size for a budget") == []
  assert any("largest size tried: add sizes" in text for text in said.unknown)


@pytest.mark.parametrize("base", [None, cases.make_config(moe__hidden=64)])
def test_the_command_gives_the_best_config(base):
  """Its flags, applied to what train starts from, make exactly the winner's config."""
  fields = {"moe__router": "noisy_top_k", "moe__noisy_top_k__noise_std": 0.5}
  worse = cases.record(3.0, seed=1)
  best = cases.record(2.0, seed=1, moe__capacity_factor=None, **fields)
  (finding,) = [f for f in write([worse, best], base).findings if f.command]
  program, *flags = shlex.split(finding.command.removeprefix("python -m "))
  assert program == "experiments.train" and flags[0] == "--workdir=runs/best"
  config = Config() if base is None else config_text.from_dict(config_text.to_dict(base))
  # The router first: its options are checked against it.
  for flag in sorted(flags[1:], key=lambda f: not f.startswith("--config.moe.router=")):
    name, _, value = flag.removeprefix("--config.").partition("=")
    config_text.set_field(config, name, config_text.parse_value(name, value))
  assert config == best.config
  if base is not None:
    # moe.hidden is 64 there and 512 here; sequence length, for one, is no flag.
    assert "--config.moe.hidden=512" in flags
    assert not any("sequence_length" in flag for flag in flags)


def test_the_command_names_the_file_of_a_router_of_ones_own(monkeypatch):
  """`train` would not know it otherwise."""

  class Mine(TopK):
    name = "mine"

  monkeypatch.setitem(ROUTERS, "mine", Mine)
  worse, best = cases.record(3.0, seed=1), cases.record(2.0, seed=1, moe__router="mine")
  for runs, start in (
    ([worse, best], f"MOEJAX_ROUTERS={__file__} python -m experiments.train "),
    (
      [cases.record(1.0, seed=1, moe__num_experts=8), best],
      "python -m experiments.train ",
    ),
  ):
    (finding,) = [f for f in write(runs).findings if f.command]
    assert finding.command.startswith(start)


def test_what_makes_losses_incomparable_is_said():
  """Other held-out tokens, other text, other code, runs that are open or lost."""
  runs = [
    cases.record(3.0, moe__num_experts=4),
    cases.record(
      3.0,
      moe__num_experts=8,
      values={"eval_tokens": 99, "dataset": "b", "revision": "r2"},
    ),
    cases.record(3.0, moe__num_experts=16, values={"dataset": "a", "revision": "r1"}),
    cases.record(None, moe__num_experts=32),
    cases.record(None, moe__num_experts=64, state="failed"),
  ]
  text = "\n".join(write(runs).unknown)
  assert "different held-out tokens (99 to 5,000)" in text
  assert "read different texts" in text and "2 revisions of the code" in text
  assert "1 of 5 runs are not finished" in text and ": failed." in text
  assert "no finite held-out loss and is left out: num_experts=32,seed=0" in text


def test_logged_step_times_come_with_a_warning():
  """Runs beside each other slow each other; timed ones were alone."""
  runs = cases.grid(num_seeds=1)
  assert not any("logged while training" in text for text in write(runs).unknown)
  runs[0].values["step_time_source"] = "logged"  # pyright: ignore
  assert any(t.startswith("Some step times were logged") for t in write(runs).unknown)
