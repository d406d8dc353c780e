"""Derived numbers by hand calculation, and the writers that keep them."""

import dataclasses
import io
import json
import math
import time

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models.loss import Sums
from moejax.routing.base import RouterStats
from moejax.run import metrics, progress, writers


def _stats() -> RouterStats:
  """Two layers, four experts, ten tokens, K = 2: twenty assignments asked for.

  Layer 0 computes 16 of them, unevenly; layer 1 all, evenly.
  """
  return RouterStats(
    num_valid=jnp.array([10.0, 10.0]),
    chosen=jnp.array([[12.0, 4.0, 4.0, 0.0], [5.0, 5.0, 5.0, 5.0]]),
    load=jnp.array([[8.0, 4.0, 4.0, 0.0], [5.0, 5.0, 5.0, 5.0]]),
    importance=jnp.full((2, 4), 2.5),
    entropy=jnp.array([10 * math.log(2), 10 * math.log(4)]),
    dropped_tokens=jnp.array([1.0, 0.0]),
  )


def test_layer_metrics_by_hand():
  values = metrics.layer_metrics(_stats())
  np.testing.assert_allclose(values["load"][0], [0.5, 0.25, 0.25, 0.0])
  np.testing.assert_allclose(values["drop_fraction"], [4 / 20, 0])
  np.testing.assert_allclose(values["dropped_tokens"], [0.1, 0])
  np.testing.assert_allclose(values["entropy"], [math.log(2), math.log(4)], rtol=1e-6)
  np.testing.assert_allclose(values["entropy_fraction"], [0.5, 1.0], rtol=1e-6)
  np.testing.assert_allclose(values["max_load_ratio"], [8 / 4, 1.0])
  np.testing.assert_allclose(values["dead_experts"], [1, 0])


def test_what_an_exchange_lost_is_a_part_of_what_was_dropped():
  """Three of the four dropped ones had no room in a buffer; without one, no such line."""
  one = jnp.float32(1)
  sums = Sums(loss=one, tokens=one, bytes=one, aux={}, stats=_stats())
  assert "exchange_lost_fraction" not in metrics.loss_metrics(sums)
  stats = dataclasses.replace(_stats(), lost=jnp.array([3.0, 0.0]))
  out = metrics.loss_metrics(dataclasses.replace(sums, stats=stats))
  assert out["dropped_fraction"] == pytest.approx(4 / 40)
  assert out["exchange_lost_fraction"] == pytest.approx(3 / 40)


def test_a_layer_without_tokens_gives_zeros_and_no_warning():
  empty = RouterStats(
    num_valid=jnp.zeros(1),
    chosen=jnp.zeros((1, 3)),
    load=jnp.zeros((1, 3)),
    importance=jnp.zeros((1, 3)),
    entropy=jnp.zeros(1),
    dropped_tokens=jnp.zeros(1),
  )
  values = metrics.layer_metrics(empty)
  assert all(np.all(np.isfinite(v)) for v in values.values())
  assert metrics.dropped_fraction(empty) == 0.0


def test_loss_metrics_divide_each_sum_once():
  """100 nats over 50 tokens that stand for 40 bytes: 2 nats/token, 3.607 bits/byte."""
  sums = Sums(
    loss=jnp.float32(100),
    tokens=jnp.float32(50),
    bytes=jnp.float32(40),
    aux={"balance_loss": jnp.float32(75)},
    stats=_stats(),
  )
  values = metrics.loss_metrics(sums)
  assert values["loss"] == 2.0
  assert values["balance_loss"] == 1.5
  assert values["bits_per_byte"] == pytest.approx(100 / math.log(2) / 40)
  assert values["dropped_fraction"] == pytest.approx(4 / 40)
  no_bytes = metrics.loss_metrics(
    dataclasses.replace(sums, bytes=jnp.float32(0), stats=None)
  )
  assert "bits_per_byte" not in no_bytes
  assert "dropped_fraction" not in no_bytes


def test_utilisation_is_flops_over_the_peak_of_all_devices():
  """1e6 tokens/s of 1e9 FLOPs on two H100 (989e12 each): 1e15 / 1978e12."""
  values = metrics.speed_metrics(
    2e6, 2.0, flops_per_token=1e9, num_devices=2, device_kind="NVIDIA H100 80GB HBM3"
  )
  assert values["tokens_per_second"] == 1e6
  assert values["model_flops_per_second"] == 1e15
  assert values["utilisation"] == pytest.approx(1e15 / 1978e12)
  on_cpu = metrics.speed_metrics(
    1.0, 1.0, flops_per_token=1.0, num_devices=1, device_kind="cpu"
  )
  assert "utilisation" not in on_cpu


def test_utilisation_is_by_device_where_a_chip_has_two():
  """Four chips of TPU7x are eight devices: 2307e12 / 2 each, so half of it is half."""
  values = metrics.speed_metrics(
    1e6,
    1.0,
    flops_per_token=4 * 2307e12 / 2 / 1e6,
    num_devices=8,
    device_kind="TPU7x",
  )
  assert values["utilisation"] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["NVIDIA H100 MIG 1g.10gb", "Tesla V100-SXM2-16GB"])
def test_without_a_known_peak_there_is_no_utilisation(kind):
  """A slice of a GPU is not in the table, and a V100 has no bfloat16 products."""
  values = metrics.speed_metrics(
    1.0, 1.0, flops_per_token=1.0, num_devices=1, device_kind=kind
  )
  assert set(values) == {"tokens_per_second", "model_flops_per_second"}


def test_many_experts_are_logged_as_quantiles():
  values = metrics.layer_metrics(_stats())
  assert metrics.layers_for_log(values)["load"][0] == [0.5, 0.25, 0.25, 0.0]
  values["load"] = np.full((3, 512), 1 / 512)
  logged = metrics.layers_for_log(values)
  assert "load" not in logged
  assert np.shape(logged["load_quantiles"]) == (3, len(metrics.QUANTILES))


class TestJsonl:
  """metrics.jsonl after crashes and resumes."""

  def test_resuming_cuts_the_steps_that_are_redone(self, tmp_path):
    writer = writers.JsonlWriter(tmp_path, resume_step=0)
    for step in range(1, 7):
      writer.write(step, {"loss": float(step)})
    writer.close()
    writer = writers.JsonlWriter(tmp_path, resume_step=4)
    writer.write(5, {"loss": 50.0})
    writer.close()
    lines = writers.read(writer.path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["loss"] == 50.0

  def test_a_torn_last_line_is_dropped_and_nothing_else(self, tmp_path):
    path = tmp_path / writers.METRICS_FILE
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [line["step"] for line in writers.read(path)] == [1]
    writer = writers.JsonlWriter(tmp_path, resume_step=1)
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]

  def test_a_loss_that_is_not_a_number_is_valid_json(self, tmp_path):
    writer = writers.JsonlWriter(tmp_path, resume_step=0)
    writer.write(1, {"loss": math.nan, "moe": {"load": [[math.inf]]}})
    writer.close()
    text = writer.path.read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None


def test_tensorboard_series_are_bounded_whatever_the_number_of_experts(tmp_path):
  """61 layers of 16 experts: scalars over layers, histograms of at most 16 layers."""
  tags: list[str] = []

  class Recorder:
    def scalar(self, tag, value, step):
      tags.append(tag)

    def histogram(self, tag, step, **_):
      tags.append(tag)

  writer = writers.TensorBoardWriter(tmp_path, resume_step=0)
  writer.close()
  writer._writer = Recorder()  # pyright: ignore[reportAttributeAccessIssue]
  moe = {"load": np.full((61, 16), 1 / 16).tolist(), "entropy": [1.0] * 61}
  for step in (1, 2):
    writer.write(step, {"loss": 1.0, "moe": moe})
  assert len(set(tags)) == 1 + 2 + writers.MAX_HISTOGRAMS


class TestProgress:
  """What a person sees."""

  def test_a_log_file_gets_a_bounded_number_of_lines(self):
    stream = io.StringIO()
    reporter = progress.make_reporter(10_000, stream=stream)
    for step in range(1, 10_001):
      reporter.update(step, {"loss": 1.0} if step % 10 == 0 else {})
    reporter.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) <= progress.MAX_LINES + 1
    assert lines[-1].startswith("step 10000/10000  loss 1.000")

  def test_the_numbers_worth_watching_are_named(self):
    values = {"loss": 2.0, "tokens_per_second": 12_345.0, "dropped_fraction": 0.034}
    text = progress.describe(values | {"skipped_steps": 2})
    assert text == "loss 2.000  12.3k tokens/s  dropped 3.4%  skipped 2"

  def test_other_processes_are_silent(self):
    stream = io.StringIO()
    reporter = progress.make_reporter(1, process_index=1, stream=stream)
    reporter.update(1, {"loss": 1.0})
    reporter.message("hello")
    with reporter.working("compiling"):
      pass
    assert stream.getvalue() == ""

  @pytest.mark.parametrize("terminal", [False, True])
  def test_what_takes_long_is_named_while_it_lasts(self, terminal):
    """Before the work is done it is named; afterwards its seconds are. Once only."""

    class Stream(io.StringIO):
      def isatty(self):
        return terminal

    stream = Stream()
    reporter = progress.make_reporter(4, stream=stream)

    def work(x):
      time.sleep(0.3)  # Longer than the bar takes to draw itself again.
      return stream.getvalue(), x

    step = progress.first_call(work, "compiling the train step", reporter)
    seen, value = step(7)
    assert value == 7 and "compiling the train step" in seen
    assert "compiling the train step: 0." not in seen
    step(8)
    reporter.close()
    assert stream.getvalue().count("compiling the train step: 0.3 s") == 1

  def test_a_terminal_gets_a_bar(self):
    class Terminal(io.StringIO):
      def isatty(self):
        return True

    stream = Terminal()
    reporter = progress.make_reporter(4, stream=stream)
    reporter.update(2, {"loss": 1.5, "tokens_per_second": 100.0})
    reporter.update(4, {"loss": 1.25})
    reporter.close()
    assert "loss 1.250" in stream.getvalue()
    assert "100 tokens/s" in stream.getvalue()

  def test_time_left_does_not_count_the_step_that_compiles(self, monkeypatch):
    """100 s until the first step is done, then 1 s each: 8 steps are 8 s."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    clock = progress._Clock(10)
    clock.start(0)
    now[0] = 100.0
    clock.start(1)
    assert clock.left(1) == "--:--"
    now[0] = 101.0
    clock.start(2)
    assert clock.left(2) == "0:08"
