"""What a sweep will cost: exact counts, and a time that says what it rests on."""

import json

import pytest

from configs import default
from moejax.cost import chips, memory
from moejax.cost.parameters import count_parameters
from moejax.sweep.points import axes, predict
from moejax.sweep.points.expand import points
from moejax.sweep.points.predict import Rate
from moejax.sweep.spec import RUNS, Point, Spec


def make(seeds: tuple[int, ...] = (0,)) -> list[Point]:
  on = (axes.product("moe.num_experts", 8, 64), axes.product("train.num_steps", 10, 30))
  return points(Spec(base=default.get_config(), axes=on, seeds=seeds))


def log(workdir, point: Point, speeds: list[float]) -> None:
  """A run's metrics as training writes them, the last line cut off."""
  directory = workdir / RUNS / point.directory
  directory.mkdir(parents=True)
  lines = [
    json.dumps({"step": i, "model_flops_per_second": s}) for i, s in enumerate(speeds)
  ]
  (directory / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "mod']))


def test_counts_are_those_of_the_cost_module():
  """Parameters, FLOPs and memory by the exact formulas; time is FLOPs over the rate."""
  rate = Rate(flops_per_second=1e9, words="")
  found = predict.predict(make(), rate)
  last = found[-1]
  total, active = count_parameters(last.point.config, 1024)
  assert (last.total_parameters, last.active_parameters) == (
    total["total"],
    active["total"],
  )
  assert last.tokens == 30 * 16 * 128
  least = memory.least_bytes(
    last.point.config, {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}, 1024
  )
  assert last.memory_bytes == sum(least.values())
  assert last.seconds == pytest.approx(last.flops_per_token * 30 * 16 * 128 / 1e9)
  assert found[1].flops == 3 * found[0].flops


def test_more_experts_cost_memory_and_hardly_any_flops():
  few, _, many, _ = predict.predict(make(), Rate(flops_per_second=1e9, words=""))
  assert many.memory_bytes > 3 * few.memory_bytes
  assert few.flops < many.flops < 1.03 * few.flops


def test_devices_share_memory_and_add_speed():
  """Experts lie on the devices of the expert axis; cores of a machine are not added."""
  config = default.get_config()
  config.mesh.expert = -1
  config.mesh.data = 1
  assert predict.mesh_of(config, 4) == {"data": 1, "fsdp": 1, "expert": 4, "tensor": 1}
  (point,) = points(Spec(base=config))
  chip = Rate(flops_per_second=1e9, words="", is_per_device=True)
  (one,) = predict.predict([point], chip)
  (four,) = predict.predict([point], chip, devices_per_run=4)
  assert four.memory_bytes < one.memory_bytes and four.seconds == one.seconds / 4
  cores = Rate(flops_per_second=1e9, words="")
  (same,) = predict.predict([point], cores, devices_per_run=4)
  assert same.seconds == one.seconds


def test_measured_rates_come_first(tmp_path):
  """Of its own setting where there is a run; the median elsewhere. The first interval,
  which compiles, does not count, nor does a line that is being written."""
  found = make(seeds=(0, 1))
  log(tmp_path, found[0], [1.0, 2e9, 4e9, 3e9])
  log(tmp_path, found[2], [1.0, 5e9])
  log(tmp_path, found[4], [9e9])  # Too little to tell.
  rate = predict.choose_rate(tmp_path, found)
  assert [rate.of(point) / 1e9 for point in found] == [3, 3, 5, 5, 4, 4, 4, 4]
  assert rate.words == (
    "measured in 2 runs of this sweep; 2 other settings at their median, 4 GFLOP/s"
  )
  assert predict.slots(rate, 4) == 4


def test_without_runs_the_machine_is_asked(tmp_path, monkeypatch):
  """A directory that is not there yet is no error; fake devices have no known peak."""
  monkeypatch.setattr(predict, "product_speed", lambda: 1e11)
  rate = predict.choose_rate(tmp_path / "new", make())
  assert rate.flops_per_second == pytest.approx(3e10)
  assert rate.words == (
    "30% of a float32 matrix product just timed on this machine, 100 GFLOP/s"
  )
  assert predict.slots(rate, 4) == 1


def test_a_known_chip_is_not_timed(monkeypatch):
  """30% of its peak; each run has one of its own."""
  monkeypatch.setattr(chips, "per_device", lambda kind: chips.CHIPS["h100"])
  rate = predict.choose_rate(None, make())
  assert rate.flops_per_second == pytest.approx(0.3 * 989e12)
  assert "bfloat16 peak" in rate.words and "989 TFLOP/s" in rate.words
  assert predict.slots(rate, 4) == 4


def test_a_product_is_timed():
  """Some speed that a machine can have."""
  assert 1e7 < predict.product_speed() < 1e16


def test_the_sweep_takes_its_runs_over_the_slots_and_never_less_than_the_longest():
  rate = Rate(flops_per_second=1e9, words="")
  found = predict.predict(make(), rate)
  total = sum(p.seconds for p in found)
  assert predict.sweep_seconds(found, rate, 1) == total
  assert predict.sweep_seconds(found, rate, 2) == total / 2
  assert predict.sweep_seconds(found, rate, 99) == max(p.seconds for p in found)
