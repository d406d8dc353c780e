"""A run warns once, at its start, of what its step sends and nobody asked for."""

import dataclasses
import logging
from typing import Any

import jax
import pytest

from moejax.config import MeshConfig
from moejax.sharding import rules
from moejax.sharding.mesh import make_mesh
from moejax.train import finish, loop, wire
from moejax.train import state as state_lib
from moejax.train.step import StepMetrics
from tests.hlo.test_parse import PROGRAM
from tests.train.conftest import make_batch, make_setup, tiny_config

EVERYTHING = MeshConfig(data=1, expert=2, fsdp=2, tensor=2)


def one_layer(mesh: MeshConfig):
  """The tiny model with its sparse layer alone: half the time to compile."""
  config = tiny_config(num_steps=1)
  config.model = dataclasses.replace(config.model, num_layers=1)
  config.moe = dataclasses.replace(config.moe, every=1, offset=0)
  return dataclasses.replace(config, mesh=mesh)


def warnings_of(caplog) -> list[str]:
  return [r.getMessage() for r in caplog.records if "no sharding rule" in r.getMessage()]


def break_rule(monkeypatch, **changes) -> None:
  """Parameters are made by another table than the one they are used by."""
  broken = dataclasses.replace(rules.RULES, **changes)

  def shardings(model, mesh):
    return rules.shardings(mesh, model.logical_axes(), model.shapes(), broken)

  monkeypatch.setattr(state_lib, "param_shardings", shardings)


@pytest.mark.slow
def test_a_run_with_a_hole_in_a_sharding_rule_warns_once(
  monkeypatch, caplog, cache_dir, tmp_path
):
  """Experts that every device holds: their gradients are gathered, and that is said.

  With the kind, the axis, the bytes and the command that prints the whole table.
  """
  break_rule(monkeypatch, expert=None)
  monkeypatch.setattr(finish, "finish", lambda run, reporter: {"exit_code": 0})
  monkeypatch.setattr(loop, "make_evaluate", lambda *_: lambda: None)
  config = one_layer(MeshConfig(data=2, expert=4))
  config.data.cache_dir = cache_dir
  given = "--config=configs/default.py --config.mesh.expert=4"
  loop.train(config, tmp_path, devices=jax.devices(), config_flags=given)
  [text] = warnings_of(caplog)
  assert "all-gather over expert" in text
  # The gathered gradient of one matrix: E 4, D 32, F 64, four bytes each.
  assert f"{4 * 32 * 64 * 4:,} bytes" in text
  assert f"python -m tools.collectives {given} " in text and "--devices=8" in text


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh",
  [
    EVERYTHING,
    MeshConfig(data=8),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=1, expert=4, tensor=2),
    MeshConfig(data=2, fsdp=2, expert=2),
    MeshConfig(data=1, fsdp=4, tensor=2),
  ],
  ids=str,
)
def test_a_step_whose_rules_are_whole_does_not(mesh, caplog):
  """On every kind of mesh; and the step that was looked at is the one that runs."""
  config = one_layer(mesh)
  setup = make_setup(config, 8)
  step = wire.watched(setup.step, config, setup.mesh)
  with jax.set_mesh(setup.mesh):
    state, metrics = step(setup.state(), setup.place(make_batch(0)))
  assert int(state["step"]) == 1 and float(metrics.sums.tokens) > 0
  assert not warnings_of(caplog)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["expert", "hidden", "heads", "vocab"])
def test_every_axis_that_a_rule_may_miss_is_noticed(rule, monkeypatch, caplog):
  """One dimension at a time is not cut, and something must be moved for it."""
  break_rule(monkeypatch, **{rule: None})
  config = one_layer(EVERYTHING)
  setup = make_setup(config, 8)
  with jax.set_mesh(setup.mesh):
    shapes = state_lib.state_shapes(setup.model, setup.optimizer, setup.mesh)
    step: Any = setup.step
    lowered = step.lower(shapes, setup.place(make_batch(0)))
    wire.warn(lowered.compile(), config, setup.mesh)
  assert len(warnings_of(caplog)) == 1


class FakeStep:
  """A train step whose program is what a test says."""

  def __init__(self, text):
    self.text, self.compilations = text, 0

  def lower(self, state, batch):
    return self

  def compile(self):
    self.compilations += 1
    return self

  def as_text(self):
    return self.text() if callable(self.text) else self.text

  def __call__(self, state, batch):
    # Nobody reads the metrics.
    return {"sum": state["x"] + batch["x"]}, object.__new__(StepMetrics)


def sums(step: FakeStep, times: int = 1) -> list[int]:
  """What the watched step returns when it is called with 1 and 0, 1 and 1, ..."""
  config = tiny_config()
  config.mesh = MeshConfig(data=4, expert=2)
  watched: Any = wire.watched(step, config, make_mesh(config.mesh, jax.devices()))
  return [watched({"x": 1}, {"x": n})[0]["sum"] for n in range(times)]


def test_the_step_is_compiled_and_looked_at_once(caplog):
  """Three steps, one compilation, one warning."""
  fake = FakeStep(PROGRAM)
  assert sums(fake, times=3) == [1, 2, 3]
  assert fake.compilations == 1 and len(warnings_of(caplog)) == 1


def test_only_the_first_process_warns(caplog, monkeypatch):
  """The others have the same program, and nothing to add."""
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert sums(FakeStep(PROGRAM)) == [1]
  assert not warnings_of(caplog)


@pytest.mark.parametrize("text", [lambda: 1 / 0, None, PROGRAM.replace("{4,5}", "{4,x}")])
def test_a_program_that_cannot_be_read_ends_no_run(text, caplog):
  """A spelling of tomorrow's compiler is a line for debugging."""
  with caplog.at_level(logging.DEBUG, logger="absl"):
    assert sums(FakeStep(text)) == [1]
  levels = {r.levelno for r in caplog.records if r.name == "absl"}
  assert levels <= {logging.DEBUG}


def test_one_device_sends_nothing():
  """The step itself comes back, compiled when and how jax likes."""
  step = FakeStep(PROGRAM)
  config = tiny_config()
  assert wire.watched(step, config, make_mesh(config.mesh, jax.devices()[:1])) is step
