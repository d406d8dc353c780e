"""Alarms of real runs: each is raised by a config that makes its router ill."""

import io
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from matplotlib import figure

from moejax.alarms import history
from moejax.evaluate import report
from moejax.models.loss import Sums
from moejax.models.router_health import RouterHealth
from moejax.routing.base import RouterStats
from moejax.run import progress, writers
from moejax.train import finish, loop, step_log
from moejax.train import step as step_lib
from moejax.train.setup import Run
from tests.train.conftest import tiny_config


def sharpen(config) -> None:
  """Router logits of tens of thousands: each token's softmax is one or zero."""
  config.moe.router_init_scale = 1e4
  config.moe.balance_weight = config.moe.z_weight = 0.0


def collapse(config) -> None:
  """No balance loss, and a learning rate that throws all tokens to one expert."""
  config.moe.balance_weight = config.moe.z_weight = 0.0
  config.moe.capacity_factor = 1.0
  config.optimizer.learning_rate = 0.3
  config.alarms.max_dead_steps = 10


def weigh(config) -> None:
  """A z-loss of which the router learns more than of the text."""
  config.moe.z_weight = 1e4


def overdo(config) -> None:
  """A bias that moves by more than scores can differ."""
  config.moe.use_router("sigmoid_bias", bias_update_rate=1.0)


ILL = {
  sharpen: {"max_logit", "max_gate", "min_gradient"},
  collapse: {"max_load", "min_load_entropy", "max_drops", "max_dead_steps"},
  weigh: {"max_aux_share", "max_gradient"},
  overdo: {"max_bias_span"},
}


@pytest.fixture
def trained(cache_dir, compilation_cache, monkeypatch, tmp_path):
  """A function that trains a tiny config; returns the lines logged and the output."""
  done = {"status": "done", "exit_code": 0}
  monkeypatch.setattr(finish, "finish", lambda run, reporter: done)

  def train(change, num_steps: int, workdir=tmp_path / "run", **alarms):
    config = tiny_config(num_steps=num_steps, checkpoint_every=num_steps)
    config.data.cache_dir = cache_dir
    change(config)
    for name, value in alarms.items():
      setattr(config.alarms, name, value)
    stream = io.StringIO()
    loop.train(config, workdir, devices=jax.devices()[:1], stream=stream)
    return writers.read(workdir / writers.METRICS_FILE), stream.getvalue()

  return train


def make_metrics(config, top_logit: float) -> step_lib.StepMetrics:
  """A step of a healthy layer of four experts, but for its logits."""
  one, four = jnp.ones(1), jnp.ones((1, 4))
  stats = RouterStats(
    num_valid=4 * one,
    chosen=four,
    load=four,
    importance=four,
    entropy=one,
    dropped_tokens=0 * one,
    top_gate=one,
    top_logit=4 * top_logit * one,
  )
  scalar = jnp.float32(4.0)
  aux = {"balance_loss": scalar, "z_loss": scalar}
  return step_lib.StepMetrics(
    sums=Sums(loss=scalar, tokens=scalar, bytes=scalar, aux=aux, stats=stats),
    grad_norm=scalar,
    learning_rate=scalar,
    bad_total=jnp.int32(0),
    bad_in_a_row=jnp.int32(0),
    health=RouterHealth(gradient=one, other_gradient=scalar, bias_span=0 * one),
  )


def test_a_log_line_has_the_alarms_and_the_run_says_them(setup, tmp_path):
  """Raised at the second logged step, 4, and cleared at the next: steps in between are
  not looked at. Both files have the counts, and the picture can be drawn."""
  config = tiny_config(log_every=2, tensorboard=True)
  config.alarms.patience = 2
  run = object.__new__(Run)
  run.config, run.workdir, run.start_step, run.model = config, tmp_path, 0, setup.model
  run.flops_per_token, run.mesh = 1.0, setup.mesh
  stream = io.StringIO()
  log = step_log.StepLog(run, progress.Lines(8, stream))
  for step, logit in enumerate([99.0, 99.0, 1.0, 60.0, 99.0, 3.0, 1.0], 1):
    log.add(step, make_metrics(config, logit))
  log.close()
  lines = writers.read(tmp_path / writers.METRICS_FILE)
  assert [line["step"] for line in lines] == [2, 4, 6]
  assert [line["alarms_active"] for line in lines] == [0, 1, 0]
  assert [line["alarms_raised"] for line in lines] == [0, 1, 1]
  assert lines[1]["alarms"] == {"max_logit": {"value": 60.0, "layer": 1}}
  assert lines[1]["moe"]["top_logit"] == [60.0]
  said = [text for text in stream.getvalue().splitlines() if "max_logit" in text]
  assert said == [
    "ALARM max_logit at step 4: layer 1: the largest logit of a token is 60.0 "
    "(--config.alarms.max_logit=50.0). Raise --config.moe.z_weight (now 0.001), or "
    "lower --config.optimizer.learning_rate.",
    "Alarm max_logit cleared at step 6: layer 1: the largest logit of a token is 3.0.",
  ]
  assert history.spans(lines) == {"max_logit": [(4, 6)]}
  assert report.draw(tmp_path) == tmp_path / report.FILE


def test_the_legend_is_readable_over_curves_and_hatching():
  """It has a background, with alarms and without."""
  axes = figure.Figure().subplots()
  lines = [
    {"step": step, "loss": 2.0, "alarms_active": 1, "alarms": {"max_load": {}}}
    for step in (1, 2)
  ]
  for draw in (
    lambda: report.draw_loss(axes, lines, {}),
    lambda: report.draw_alarms(axes, lines),
  ):
    draw()
    legend = axes.get_legend()
    assert legend is not None and legend.get_frame_on()
    assert (legend.get_frame().get_alpha() or 0) >= 0.8


@pytest.mark.slow
def test_alarms_of_a_run_are_printed_logged_drawn_and_start_anew_on_resuming(
  trained, tmp_path
):
  """A router whose logits are thousands, from the first step, with a patience of 3.

  Raised at step 3, and after a resume at step 8 again at step 11: the state is not kept.
  """
  lines, text = trained(sharpen, 8, patience=3)
  assert "ALARM max_logit at step 3: layer 1: " in text
  assert [line["step"] for line in lines if "max_logit" in line.get("alarms", {})] == [
    *range(3, 9)
  ]
  assert lines[1]["alarms_active"] == lines[1]["alarms_raised"] == 0
  assert lines[7]["alarms_active"] == len(lines[7]["alarms"])
  assert lines[7]["alarms_raised"] >= lines[7]["alarms_active"]
  assert lines[7]["alarms"]["max_logit"]["layer"] == 1
  assert lines[7]["moe"]["top_logit"][0] > 50
  lines, text = trained(sharpen, 12, patience=3)
  assert "ALARM max_logit at step 11: " in text
  steps = [line["step"] for line in lines if "max_logit" in line.get("alarms", {})]
  assert steps == [*range(3, 9), 11, 12]
  assert report.draw(tmp_path / "run") == tmp_path / "run" / report.FILE


@pytest.mark.slow
@pytest.mark.parametrize("change", ILL, ids=lambda change: change.__name__)
def test_each_alarm_is_raised_by_a_config_that_makes_a_router_ill(trained, change):
  """With the default thresholds and patience, within 40 steps."""
  lines, text = trained(change, 40)
  raised = {name for line in lines for name in line.get("alarms", {})}
  assert ILL[change] <= raised
  for name in raised:
    assert f"ALARM {name} at step " in text


@pytest.mark.slow
@pytest.mark.parametrize("router", ["switch", "sigmoid_bias", "expert_choice"])
def test_a_healthy_run_is_silent(trained, router):
  """A hundred and fifty steps of the tiny model, with the default thresholds."""

  def change(config):
    config.train.log_every = 5
    config.moe.use_router(router)
    config.moe.eval_capacity_factor = 1.0 if router == "expert_choice" else None
    config.optimizer.learning_rate = 3e-3

  lines, text = trained(change, 150)
  assert lines[-1]["alarms_raised"] == 0
  assert "ALARM" not in text


_DIGESTS = """
import hashlib, jax, numpy as np
from moejax.alarms.rules import RULES
from tests.train.conftest import make_batch, make_setup, tiny_config
for on in (True, False):
  config = tiny_config()
  for rule in [] if on else RULES:
    setattr(config.alarms, rule.name, None)
  setup = make_setup(config)
  state, seen = setup.run(setup.state(), *(make_batch(seed) for seed in range(4)))
  assert (seen[0].health is not None) == on
  assert (seen[0].sums.stats.top_gate is not None) == on
  kept = jax.tree.leaves((state["params"], state["opt_state"]))
  print(hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in kept)).hexdigest())
"""


@pytest.mark.slow
def test_alarms_change_no_value_of_training():
  """The state after four steps, bit for bit, with all alarms on and off.

  In a process of its own, with the compiler's own flags: those of the tests fuse nothing,
  and then another sum can round a first one differently.
  """
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-c", _DIGESTS],
    capture_output=True,
    text=True,
    env=environment,
    cwd=pathlib.Path(__file__).parents[2],
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  on, off = done.stdout.split()
  assert on == off
