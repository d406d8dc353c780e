"""experiments.profile as a user calls it: a table, files, and one line for a mistake."""

import json
import pathlib
import types

import pytest

from moejax.analysis import step_profile
from moejax.cli import arguments
from moejax.config import Config
from moejax.errors import UserError
from moejax.parts import PARTS
from moejax.run import progress
from tests.experiments.test_command_lines import QUICK, call


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"--out=.*file/x: .*file is a file.*another") as e:
    arguments.writable(tmp_path / "file" / "x")
  assert "\n" not in str(e.value) and e.value.exit_code == 2


def test_a_process_that_is_not_the_first_steps_and_records_nothing(monkeypatch, tmp_path):
  """It must take every step, since the others wait for it: two to warm up, three timed,
  three in the trace of the first."""
  steps = []

  class Stepper:
    def __init__(self, *_: object):
      pass

    def __call__(self) -> tuple[float, ...]:
      steps.append(1)
      return 0.0, 0.0, 0.0, 0.0

  dataset = types.SimpleNamespace(check_batch_size=lambda _: None)
  monkeypatch.setattr(step_profile, "_Stepper", Stepper)
  monkeypatch.setattr(step_profile.data, "load", lambda *_, **__: dataset)
  monkeypatch.setattr(step_profile.jax, "process_index", lambda: 1)
  config = Config()
  said = progress.Silent()
  assert step_profile.profile(config, tmp_path, num_steps=3, reporter=said) is None
  assert len(steps) == 2 + 3 + 3 and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
  """A finished run of four steps."""
  directory = tmp_path_factory.mktemp("run")
  call(
    "experiments.train",
    f"--workdir={directory}",
    f"--config.data.cache_dir={tmp_path_factory.mktemp('cache')}",
    *(f"--config.{setting}" for setting in QUICK),
  )
  return directory


@pytest.mark.slow
def test_the_parts_of_a_run_add_up_and_the_run_is_untouched(workdir):
  """Every part of a one-device step has time, at most a tenth has no part, and busy and
  waiting are the step. Only profile/ is new in the run."""
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  printed = call("experiments.profile", f"--workdir={workdir}", "--steps=3")
  new = {path for path in workdir.rglob("*") if path not in before}
  assert all(workdir / "profile" in (path, *path.parents) for path in new)
  kept = [path for path in before if path != workdir]
  assert all(path.stat().st_mtime_ns == before[path] for path in kept)
  found = json.loads((workdir / "profile" / "profile.json").read_text())
  [device] = found["devices"]
  names = {part["name"] for part in device["parts"]}
  assert set(PARTS) - {"exchange"} <= names
  total = sum(part["forward"] + part["backward"] for part in device["parts"])
  assert total == pytest.approx(device["busy"])
  assert device["busy"] + device["waiting"] == pytest.approx(found["step_ms"], rel=1e-6)
  assert device["unattributed_share"] <= 0.1
  for name in ("attention", "experts", "router", "head"):
    [part] = [part for part in device["parts"] if part["name"] == name]
    assert part["forward"] > 0 and part["backward"] > 0, name
  assert "attention" in printed and "waiting" in printed
  assert pathlib.Path(found["trace"]).exists()


@pytest.mark.slow
def test_a_config_that_is_not_the_runs_is_refused(workdir):
  error = call(
    "experiments.profile", f"--workdir={workdir}", "--config.moe.num_experts=8", code=2
  )
  assert error.startswith(f"error: --workdir={workdir} was trained with --config.moe.")
  assert "num_experts=4, not 8" in error and error.count("\n") == 1


@pytest.mark.slow
def test_each_device_of_a_mesh_has_a_table_and_sends(tmp_path, monkeypatch):
  """Two devices that hold two experts each: the exchange takes time on both."""
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
  call(
    "experiments.profile",
    f"--out={tmp_path / 'out'}",
    "--steps=2",
    f"--config.data.cache_dir={tmp_path / 'cache'}",
    "--config.mesh.data=1",
    "--config.mesh.expert=2",
    *(f"--config.{setting}" for setting in QUICK),
  )
  found = json.loads((tmp_path / "out" / "profile.json").read_text())
  assert [device["index"] for device in found["devices"]] == [0, 1]
  for device in found["devices"]:
    times = {part["name"]: part["forward"] for part in device["parts"]}
    assert times["exchange"] > 0 and device["collectives"] > 0
    assert device["unattributed_share"] <= 0.1
