"""The pass that times steps: each distinct shape once, kept, and merged whole."""

import io
import json
import os
import pathlib
import subprocess
import sys

import pytest

from moejax.config import text as config_text
from moejax.errors import UserError
from moejax.models.loss import batch_shapes
from moejax.sweep.execution import local, shapes, step_times, timing
from tests.sweep.execution import runs

ROOT = pathlib.Path(__file__).parents[3]
SLOT = local.Slot(cores=(), variables={})

STAND_IN = """
import json, sys
request = json.load(open(sys.argv[1]))
entry = {"step_ms": [1.0] * request["num_steps"], "p50": 1.0, "p90": 1.0}
json.dump({name: entry for name in request["configs"]}, open(request["output"], "w"))
print("timed", *request["configs"])
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
  script = tmp_path / "stand_in.py"
  script.write_text(STAND_IN)
  real = timing._job

  def job(*arguments):
    made = real(*arguments)
    command = (sys.executable, "-I", "-S", str(script), made.command[-1])
    return local.Job(name="timing", run=made.run, command=command, log=made.log)

  monkeypatch.setattr(timing, "_job", job)
  return script


def measure(workdir, points, num_steps=3) -> tuple[int, str]:
  said = io.StringIO()
  return timing.measure(workdir, points, num_steps, SLOT, said), said.getvalue()


def test_what_does_not_change_the_cost_of_a_step_shares_its_time():
  """Seeds, lengths, learning rates and loss weights; not widths, routers or capacity."""
  digest = shapes.shape_digest(runs.config())
  for dotted, value in [
    ("train.seed", 3),
    ("train.num_steps", 1000),
    ("optimizer.learning_rate", 0.5),
    ("moe.balance_weight", 0.5),
  ]:
    same = runs.config()
    config_text.set_field(same, dotted, value)
    assert shapes.shape_digest(same) == digest, dotted
    # The compiled program contains all of these numbers but the seed.
    equal = shapes.program_digest(same) == shapes.program_digest(runs.config())
    assert equal is (dotted == "train.seed"), dotted
  for dotted, value in [
    ("model.width", 64),
    ("moe.router", "expert_choice"),
    ("moe.capacity_factor", None),
    ("train.batch_size", 4),
    ("optimizer.name", "lion"),
  ]:
    other = runs.config()
    config_text.set_field(other, dotted, value)
    assert shapes.shape_digest(other) != digest, dotted


def test_each_shape_is_timed_once_and_only_missing_ones_later(stand_in, tmp_path):
  """Two shapes of two seeds each; later calls add runs without timing again."""
  points = runs.points()
  code, said = measure(tmp_path, points[:1])
  assert code == 0 and "3 steps of 1 shape(s)" in said
  assert measure(tmp_path, points)[0] == 0
  assert "Timing" not in measure(tmp_path, points)[1]
  assert (tmp_path / "timing.log").read_text().count("\ntimed") == 2
  found = timing.read(tmp_path)
  names = sorted(entry["runs"] for entry in found.values())
  assert names == [[p.directory for p in points[:2]], [p.directory for p in points[2:]]]
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    *("stand_in.py", "timing.json", "timing.log")
  ]


def test_a_failed_pass_leaves_the_times_as_they_were(stand_in, tmp_path, capsys):
  measure(tmp_path, runs.points()[:1])
  before = (tmp_path / "timing.json").read_text()
  stand_in.write_text("raise SystemExit('no memory')")
  assert measure(tmp_path, runs.points())[0] == 1
  assert (tmp_path / "timing.json").read_text() == before
  said = capsys.readouterr().err
  assert "Timing failed (exit code 1)" in said and "no memory" in said


@pytest.mark.parametrize("content", ["{", "[]", '{"a": {"p50": "fast"}}'])
def test_damaged_times_are_one_line_with_the_remedy(tmp_path, content):
  (tmp_path / "timing.json").write_text(content)
  with pytest.raises(UserError, match=r"timing.json .*Delete it") as error:
    timing.read(tmp_path)
  assert "\n" not in str(error.value)


def test_the_percentiles_of_a_step():
  """Ten steps of 1 to 10 ms: the median 5.5, and 9.1 at 90% (numpy's linear rule)."""
  found = step_times.summary([i / 1000 for i in range(1, 11)], tokens=11)
  assert found["p50"] == pytest.approx(5.5)
  assert found["p90"] == pytest.approx(9.1)
  assert found["tokens_per_second"] == pytest.approx(2000.0)


def test_a_timed_batch_has_what_the_model_reads():
  """Two stacks: 2 rows of 32 tokens for the encoder and of 8 for the decoder."""
  config = runs.config()
  config.model.kind, config.data.objective = "encoder_decoder", "span_corruption"
  config.data.decoder_length = 8
  batch = step_times.random_batch(config, 50)
  assert {name: x.shape for name, x in batch.items()} == batch_shapes(config)
  assert batch["inputs"].shape == (2, 8) and batch["encoder_inputs"].shape == (2, 32)
  assert (batch["encoder_segment_ids"] == 1).all() and batch["inputs"].max() < 50
  assert batch["encoder_positions"][1].tolist() == list(range(32))


@pytest.mark.slow
def test_a_real_pass_on_a_mesh_counts_what_is_sent_between_devices(tmp_path):
  """Devices that share the experts send tokens by all-to-all; replicas send none."""
  configs = {"replicas": runs.config(), "experts": runs.config()}
  configs["replicas"].mesh.data = configs["experts"].mesh.expert = 2
  request = {
    "configs": {name: config_text.to_dict(c) for name, c in configs.items()},
    "num_steps": 4,
    "output": str(tmp_path / "result.json"),
  }
  (tmp_path / "request.json").write_text(json.dumps(request))
  subprocess.run(
    [
      sys.executable,
      "-m",
      "moejax.sweep.execution.step_times",
      str(tmp_path / "request.json"),
    ],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)},
    check=True,
    timeout=600,
  )
  found = json.loads((tmp_path / "result.json").read_text())
  assert [entry["num_devices"] for entry in found.values()] == [2, 2]
  sent = {name: entry["all_to_all_bytes"] for name, entry in found.items()}
  assert sent["replicas"] == 0 < sent["experts"]
  for entry in found.values():
    assert len(entry["step_ms"]) == 4 and min(entry["step_ms"]) > 0
    assert entry["compile_seconds"] > 0 and entry["peak_memory_bytes"] > 0
