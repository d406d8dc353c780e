"""The loop: what it writes, when it reads, how it stops and goes on."""

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from moejax import data
from moejax.cli import flags as cli
from moejax.config import Config
from moejax.errors import UserError
from moejax.evaluate import report
from moejax.models.loss import Sums
from moejax.run import log_lines, progress, results, writers
from moejax.run.signals import StopRequest
from moejax.sharding.mesh import make_mesh
from moejax.train import loop, step_log
from moejax.train import step as step_lib
from moejax.train.setup import Run
from tests.train.conftest import tiny_config

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "loss_curve.json"


@pytest.fixture
def config(cache_dir, compilation_cache):
  config = tiny_config(num_steps=6, eval_every=3, eval_batches=2, checkpoint_every=3)
  config.data.cache_dir = cache_dir
  return config


def draw_everything(config: Config) -> None:
  """Makes each training step depend on every random draw that there is."""
  config.moe.use_router("noisy_top_k")
  config.moe.num_selected, config.moe.capacity_factor = 2, 0.75
  config.moe.jitter, config.moe.expert_dropout = 0.1, 0.25
  config.moe.priority = "random"


def _train(config, workdir):
  return loop.train(config, workdir, devices=jax.devices()[:1])


def _lines(workdir) -> list[dict]:
  return writers.read(workdir / writers.METRICS_FILE)


@pytest.mark.parametrize(
  "drawn",
  [
    pytest.param(False, marks=pytest.mark.slow, id="nothing drawn"),
    pytest.param(True, id="all drawn"),
  ],
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
  config, states, tmp_path, monkeypatch, drawn
):
  """Six steps, against three and, by another process's eyes, three more.

  Parameters and moments bit for bit; metrics.jsonl has each step once, with the
  same loss, gradient norm and learning rate. Also where every step draws a router's
  noise, jitter, a random queue and experts to leave out: a resumed run draws what the
  whole one drew.
  """
  if drawn:
    draw_everything(config)
  _train(config, tmp_path / "whole")
  agreed = loop._agreed
  monkeypatch.setattr(loop, "_agreed", lambda stop, step, *_, **__: _ask(stop, step == 4))
  stopped = _train(config, tmp_path / "parts")
  assert (stopped["step"], stopped["status"], stopped["exit_code"]) == (4, "stopped", 143)
  monkeypatch.setattr(loop, "_agreed", agreed)
  # As after a kill: a step that no checkpoint has, and a line torn in the middle.
  with (tmp_path / "parts" / writers.METRICS_FILE).open("a") as f:
    f.write('{"step": 5, "loss": 99.0}\n{"step": 6, "lo')
  _train(config, tmp_path / "parts")

  jax.tree.map(np.testing.assert_array_equal, states[0], states[1])
  whole, parts = _lines(tmp_path / "whole"), _lines(tmp_path / "parts")
  assert [line["step"] for line in parts] == [1, 2, 3, 4, 5, 6]
  for name in ("loss", "grad_norm", "learning_rate", "balance_loss"):
    assert [line[name] for line in parts] == [line[name] for line in whole]
  assert [line["step"] for line in whole if "validation_loss" in line] == [3, 6]


def test_a_run_stopped_at_its_last_step_saves_and_does_not_evaluate(
  config, states, tmp_path, monkeypatch
):
  """Whoever is told to stop may have seconds. The same command then makes up for it."""
  agreed = loop._agreed
  monkeypatch.setattr(loop, "_agreed", lambda stop, step, *_, **__: _ask(stop, step == 6))
  stopped = _train(config, tmp_path)
  assert (stopped["step"], stopped["exit_code"], states) == (6, 143, [])
  assert [s["step"] for s in _lines(tmp_path) if "validation_loss" in s] == [3]
  monkeypatch.setattr(loop, "_agreed", agreed)
  assert _train(config, tmp_path)["exit_code"] == 0
  assert len(states) == 1


def test_a_signal_during_the_agreement_counts_from_the_next_one_on(monkeypatch):
  """Otherwise this process alone would leave, and the others wait for it for ever."""
  stop = StopRequest()

  def gather(asked):
    stop.signal = signal.SIGTERM  # As a handler does, at any moment.
    return np.array([asked, 0])

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "process_allgather", gather)
  assert not loop._agreed(stop, 1, 1, is_last=False)
  assert loop._agreed(stop, 2, 1, is_last=False)


def test_a_process_learns_of_a_signal_that_another_one_got(monkeypatch):
  stop = StopRequest()

  def gather(asked):
    return np.array([asked, signal.SIGTERM])

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "process_allgather", gather)
  assert not loop._agreed(stop, 1, 2, is_last=False)
  assert loop._agreed(stop, 2, 2, is_last=False)
  assert stop.exit_code == 143


def _ask(stop, now: bool) -> bool:
  if now:
    stop.signal = signal.SIGTERM
  return now


def test_metrics_are_read_after_the_next_step_was_started(
  config, states, tmp_path, monkeypatch
):
  """Step n's numbers are fetched only once step n+1 is on the device.

  But before an evaluation or a checkpoint, which comes after every third step,
  all of them are.
  """
  events = []
  make, read = step_lib.make_train_step, step_log.StepLog._read

  def make_noted(*args, **kwargs):
    train_step = make(*args, **kwargs)

    def noted(state, batch):
      events.append(("start", int(state["step"]) + 1))
      return train_step(state, batch)

    return noted

  def noted_read(self, step, *args, **kwargs):
    events.append(("read", step))
    return read(self, step, *args, **kwargs)

  monkeypatch.setattr(step_lib, "make_train_step", make_noted)
  monkeypatch.setattr(step_log.StepLog, "_read", noted_read)
  _train(config, tmp_path)
  expected = "s1 s2 r1 s3 r2 r3 s4 s5 r4 s6 r5 r6"
  assert " ".join(f"{kind[0]}{step}" for kind, step in events) == expected


def make_log(config: Config, workdir: pathlib.Path) -> step_log.StepLog:
  """A log without model and state, which it must not need."""
  run = object.__new__(Run)
  run.config, run.workdir, run.start_step = config, workdir, 0
  checkpoints: Any = types.SimpleNamespace(wait=lambda: True, latest=lambda: 40)
  run.checkpointer = checkpoints
  run.flops_per_token = 1.0
  run.mesh = make_mesh(config.mesh, jax.devices()[:1])
  return step_log.StepLog(run, progress.Silent())


def numbers(*, bad: int = 0):
  """A step's metrics on a model without experts; `bad` steps in a row are behind it."""
  loss, eight = jnp.float32(jnp.nan if bad else 16.0), jnp.float32(8.0)
  return step_lib.StepMetrics(
    sums=Sums(loss=loss, tokens=eight, bytes=eight, aux={}, stats=None),
    grad_norm=jnp.float32(1.0),
    learning_rate=jnp.float32(0.1),
    bad_total=jnp.int32(bad),
    bad_in_a_row=jnp.int32(bad),
  )


@pytest.mark.parametrize("log_every", [1, 4])
def test_every_evaluation_is_logged_whether_or_not_a_checkpoint_follows(
  config, tmp_path, log_every
):
  """Steps 2 and 4 are evaluated and nothing is saved: both lines have the loss."""
  config.train.log_every = log_every
  log = make_log(config, tmp_path)
  for step in range(1, 6):
    log.add(step, numbers())
    if step in (2, 4):
      log.settle(keep=True)
      assert log.evaluation(step, {"loss": step / 2}) == step / 2
      log.resume()
  log.close()
  lines = {line["step"]: line for line in _lines(tmp_path)}
  assert [lines[n]["validation_loss"] for n in (2, 4)] == [1.0, 2.0]
  assert all(lines[n]["loss"] == 2.0 for n in (2, 4))
  assert set(lines) == ({1, 2, 3, 4} if log_every == 1 else {2, 4})


def test_a_long_log_grows_more_slowly_and_keeps_what_is_notable(
  config, tmp_path, monkeypatch
):
  """After two lines the interval doubles with the length; a skipped step and an
  evaluation have their lines all the same."""
  monkeypatch.setattr(log_lines, "FULL", 2)
  config.train.log_every, config.train.num_steps = 1, 30
  log = make_log(config, tmp_path)
  for step in range(1, 30):
    log.add(step, numbers(bad=int(step == 7)))
    if step == 21:
      log.settle(keep=True)
      log.evaluation(step, {"loss": 1.0})
  log.close()
  assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 4, 7, 8, 16, 21]


@pytest.mark.slow
def test_a_run_whose_directory_is_removed_ends_with_one_line(config, tmp_path, states):
  """At the next line of its log; the same command then starts anew, to the same bits."""
  workdir = tmp_path / "run"

  class Remover(io.StringIO):
    def write(self, text):
      if text.startswith("step 2/") and workdir.exists():
        shutil.rmtree(workdir)
      return super().write(text)

  gone = f"--workdir={workdir} was removed.*again from step 0"
  with pytest.raises(UserError, match=gone):
    loop.train(config, workdir, devices=jax.devices()[:1], stream=Remover())
  assert not states
  for _ in range(2):
    _train(config, workdir)
    workdir = tmp_path / "calm"
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_too_many_bad_steps_stop_the_run_and_name_the_last_good_checkpoint(
  config, tmp_path
):
  """max_bad_steps is 3: the first and second go on, the third raises."""
  log = make_log(config, tmp_path)
  for step in (1, 2, 3):
    log.add(step, numbers(bad=step))
  with pytest.raises(step_log.TrainingStopped, match=r"3 steps in a row.*checkpoints/40"):
    log.settle(keep=False)
  log.close()
  assert [line["skipped_steps"] for line in _lines(tmp_path)] == [1, 2, 3]


def test_twenty_steps_on_the_test_corpus_give_the_golden_curve(setup, cache_dir):
  """Same text, seed and sizes as when the curve was recorded; floats to 2e-3.

  Recorded by `MOEJAX_RECORD=1 pytest` on CPU with jax 0.10.2. A change of the
  numbers is a change of what is trained: find out why before recording again.
  """
  config = tiny_config()
  config.data.cache_dir = cache_dir
  dataset = data.load(config.data)
  batches = dataset.train_batches(config.train.batch_size, seed=0)
  _, seen = setup.run(setup.state(0), *(next(batches) for _ in range(20)))
  batches.close()  # pyright: ignore[reportAttributeAccessIssue]
  losses = [round(float(m.sums.loss / m.sums.tokens), 5) for m in seen]
  if os.environ.get("MOEJAX_RECORD"):
    GOLDEN.write_text(json.dumps({"loss": losses}, indent=1) + "\n")
  np.testing.assert_allclose(losses, json.loads(GOLDEN.read_text())["loss"], rtol=2e-3)
  assert losses[-1] < 0.75 * losses[0]


class TestSignals:
  """A first signal asks, a second Ctrl-C insists, and the old handlers return."""

  def test_the_first_signal_is_only_noted(self):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
      os.kill(os.getpid(), signal.SIGTERM)
      assert (stop.signal, stop.exit_code) == (signal.SIGTERM, 143)
    assert signal.getsignal(signal.SIGTERM) == before

  def test_the_second_ctrl_c_aborts(self):
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
      os.kill(os.getpid(), signal.SIGINT)
      assert stop.exit_code == 130
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)


class TestReport:
  """The picture is drawn from files alone."""

  def _write(self, workdir, num_experts: int):
    writer = writers.JsonlWriter(workdir, resume_step=0)
    for step in range(10, 60, 10):
      load = np.full((2, num_experts), 1 / num_experts).tolist()
      writer.write(step, {"loss": 5.0 - step / 20, "moe": {"load": load}})
    writer.close()

  @pytest.mark.parametrize("num_experts", [4, 64])
  def test_a_picture_is_drawn_with_and_without_an_evaluation(self, tmp_path, num_experts):
    self._write(tmp_path, num_experts)
    assert report.draw(tmp_path) == tmp_path / "report.png"
    baseline = {"loss": 3.0, "bits_per_byte": 4.3}
    final = {"loss": 2.5, "bits_per_byte": 3.6, "baselines": {"unigram": baseline}}
    results.write(tmp_path / "eval.json", final)
    path = report.draw(tmp_path)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")

  def test_nothing_logged_is_no_picture(self, tmp_path):
    assert report.draw(tmp_path) is None

  def test_smoothing_begins_on_the_data_and_keeps_a_constant(self):
    np.testing.assert_allclose(report.smooth(np.full(100, 3.0)), 3.0)
    assert report.smooth(np.arange(100.0))[0] == 0.0


@pytest.mark.slow
def test_sigterm_saves_the_same_command_goes_on_and_a_third_call_says_done(
  config, tmp_path, compilation_cache
):
  """A real process, from its first line to eval.json, report.png and the sample."""
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
  }
  command = [sys.executable, "-m", "experiments.train", f"--workdir={tmp_path}"]
  for section in ("data", "model", "moe", "train"):
    part, default = getattr(config, section), getattr(cli.load_config("default"), section)
    for name in part.__dataclass_fields__:
      value = getattr(part, name)
      if value != getattr(default, name):
        command.append(f"--config.{section}.{name}={value}".lower())
  # A path is not to be lowered, and the run is long enough to be interrupted.
  command += [f"--config.data.path={config.data.path}"]
  command += [f"--config.data.cache_dir={config.data.cache_dir}"]
  command += ["--config.train.num_steps=400", "--config.train.eval_every=1000"]
  command += ["--config.train.checkpoint_every=1000"]

  first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 300
  while not _lines(tmp_path) and time.monotonic() < deadline:
    assert first.poll() is None
    time.sleep(0.05)
  first.send_signal(signal.SIGTERM)
  out, _ = first.communicate(timeout=120)
  assert first.returncode == 143
  assert "The same command continues from checkpoint" in out
  [saved] = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
  assert 0 < saved < 400

  run = lambda: subprocess.run(  # noqa: E731
    command, env=environment, capture_output=True, text=True, timeout=600, check=True
  )
  out = run().stdout
  assert f"at step {saved}" in out and "xz -9" in out and "sample" in out
  assert len(out.splitlines()) < 60
  assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 401))
  final = json.loads((tmp_path / "eval.json").read_text())
  assert final["step"] == 400 and final["loss"] < 4
  assert (tmp_path / "report.png").exists()
  assert "Already done" in run().stdout


@pytest.mark.slow
def test_a_mesh_with_a_free_axis_goes_on_over_other_numbers_of_devices(
  config, states, tmp_path
):
  """Four routing groups: two steps on two of three devices, two more on four of eight.

  The same losses as on one device throughout, up to the order of sums; what is left out
  is said, and what takes long is named.
  """
  config.mesh.data, config.moe.group_size = -1, 64
  config.train.eval_every = config.train.checkpoint_every = 0
  said = io.StringIO()
  for steps, count in ((2, 3), (4, 8)):
    config.train.num_steps = steps
    loop.train(config, tmp_path / "many", devices=jax.devices()[:count], stream=said)
  loop.train(config, tmp_path / "one", devices=jax.devices()[:1], stream=io.StringIO())
  many, one = ([x["loss"] for x in _lines(tmp_path / d)] for d in ("many", "one"))
  np.testing.assert_allclose(many, one, rtol=1e-4)
  text = said.getvalue()
  assert "Using 2 of 3 devices: --config.train.batch_size=8" in text
  assert "Using 4 of 8 devices: --config.moe.group_size=64" in text
  for part in ("2 x CPU, mesh data 2; ", " parameters, ", "256 tokens a step, 2 steps"):
    assert part in text
  for what in ("making the parameters", "restoring checkpoint 2", "compiling the train"):
    assert f"{what}" in text
