"""The bar of where time goes: what is traced, what is drawn, and what it may not cost."""

import io
import json
from typing import Any, cast

import jax
import pytest

from moejax.evaluate import report
from moejax.run import progress, results, writers
from moejax.train import finish, loop, step_trace
from moejax.train.setup import Run
from tests.train.conftest import tiny_config


@pytest.mark.parametrize(
  ("steps", "start", "eval_every", "checkpoint_every", "trace_steps", "expected"),
  [
    (900, 0, 450, 450, 3, (896, 899)),
    # Step 898 saves; so the trace ends there, before it does.
    (900, 0, 0, 449, 3, (895, 898)),
    (900, 0, 7, 0, 3, (896, 899)),
    (900, 0, 3, 0, 3, (894, 897)),
    (900, 0, 2, 0, 3, None),
    (900, 0, 0, 0, 0, None),
    # The first step compiles, and one more is not traced.
    (6, 0, 0, 0, 3, (2, 5)),
    (5, 0, 0, 0, 3, None),
    (900, 895, 0, 0, 3, None),
    (900, 894, 0, 0, 3, (896, 899)),
  ],
)
def test_the_last_steps_without_a_pause_between_them_are_traced(
  steps, start, eval_every, checkpoint_every, trace_steps, expected
):
  config = tiny_config(
    num_steps=steps,
    eval_every=eval_every,
    checkpoint_every=checkpoint_every,
    trace_steps=trace_steps,
  )
  assert step_trace.window(config.train, start) == expected


def _part(name: str, forward: float, backward: float) -> dict:
  return {"name": name, "forward": forward, "backward": backward}


SPENT = {
  "first_step": 896,
  "num_steps": 3,
  "step_ms": 10.0,
  "devices": [
    {
      "parts": [_part("attention", 1, 2), _part("experts", 1, 3), _part("loss", 0.1, 0)],
      "busy": 7.1,
      "waiting": 2.9,
    },
    {"parts": [_part("experts", 4, 6)], "busy": 10.0, "waiting": 0.0},
  ],
}


def test_shares_of_the_bar_add_up_over_devices_and_small_parts_are_one():
  """Of 20 ms: experts 14, attention 3, the loss 0.1 (0.5%: other), waiting 2.9."""
  shares = report.time_shares(SPENT, least=0.04)
  expected = {"experts": 0.7, "attention": 0.15, "other": 0.005, "waiting": 0.145}
  assert list(shares) == list(expected)
  assert shares == pytest.approx(expected)


def test_the_picture_grows_by_the_bar(tmp_path):
  def height() -> int:
    path = report.draw(tmp_path)
    assert path is not None
    return int.from_bytes(path.read_bytes()[20:24], "big")

  writer = writers.JsonlWriter(tmp_path, resume_step=0)
  writer.write(10, {"loss": 5.0})
  writer.close()
  before = height()
  results.write(tmp_path / results.STEP_TIME_FILE, SPENT)
  assert height() > 1.2 * before


@pytest.mark.parametrize("num_devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_traces_its_last_steps_and_compiles_nothing_for_it(
  tmp_path, cache_dir, compilation_cache, caplog, monkeypatch, num_devices
):
  """The parts of each device add up to its busy time, and with waiting to the step. jax
  compiles the step once, for training: never again for the text that the trace needs."""
  monkeypatch.setattr(finish, "finish", lambda run, reporter: {"exit_code": 0})
  config = tiny_config(num_steps=8, trace_steps=2)
  config.data.cache_dir, config.mesh.data = cache_dir, num_devices
  config.data.validation_fraction = 0.0
  with jax.log_compiles():
    loop.train(config, tmp_path, devices=jax.devices()[:num_devices])
  assert len([m for m in caplog.messages if m.startswith("Compiling jit(step)")]) == 1
  found = json.loads((tmp_path / results.STEP_TIME_FILE).read_text())
  assert (found["first_step"], found["num_steps"]) == (6, 2)
  assert [device["index"] for device in found["devices"]] == list(range(num_devices))
  for device in found["devices"]:
    times = {p["name"]: p["forward"] + p["backward"] for p in device["parts"]}
    assert {"attention", "experts", "optimizer"} <= set(times)
    assert sum(times.values()) == pytest.approx(device["busy"])
    assert device["busy"] + device["waiting"] == pytest.approx(found["step_ms"])
  assert [line["step"] for line in writers.read(tmp_path / "metrics.jsonl")] == [
    *range(1, 9)
  ]


def test_a_profiler_that_is_busy_costs_the_bar_and_nothing_else(tmp_path):
  """Somebody else's trace is being taken: it goes on, and one line says why."""
  config = tiny_config(num_steps=8, trace_steps=2)
  run = object.__new__(Run)
  run.config, run.start_step, run.workdir = config, 0, tmp_path
  run.state = cast(Any, {})
  out = io.StringIO()
  trace = step_trace.StepTrace(run, None, progress.Lines(8, out))
  [before] = [step for step in range(8) if trace.due(step)][:1]
  with jax.profiler.trace(str(tmp_path / "other")):
    trace.take(before, cast(Any, {}))
    assert not any(trace.due(step) for step in range(8))
    trace.close()
  assert list((tmp_path / "other").rglob("*.xplane.pb"))
  [note] = out.getvalue().splitlines()
  assert note.startswith("Note: report.png does not show where time goes: ")
  assert "profile" in note.lower()
