"""The end of a run: bounded, visible, and honest about what it measured."""

import errno
import io
import json
import lzma

import jax
import numpy as np
import pytest
from rich.console import Console

from moejax import data
from moejax.checkpoint import orbax
from moejax.checkpoint.read import pack_meta
from moejax.errors import UserError
from moejax.run import progress, writers
from moejax.train import finish, loop
from tests.train.conftest import tiny_config

_BATCH = 8 * 32
"""Tokens of a batch of `tiny_config`."""


@pytest.mark.parametrize(
  ("asked", "steps", "eval_batches", "split", "expected"),
  [
    (0, 20, 1, 10_000_000, 10_000_000),
    (1000, 20, 1, 10_000_000, 1000),
    (1000, 20, 1, 700, 700),
    (-1, 1000, 1, 10_000_000, 1000 * _BATCH // 4),
    # At least what the evaluations on the way cover: 16 batches, or all.
    (-1, 20, 16, 10_000_000, 16 * _BATCH),
    (-1, 20, 0, 300_000, 300_000),
    (-1, 20, 0, 10_000_000, finish.MAX_TOKENS),
    (-1, 10**6, 1, 10_000_000, finish.MAX_TOKENS),
    (-1, 1000, 1, 500, 500),
  ],
)
def test_how_much_the_final_evaluation_covers(
  asked, steps, eval_batches, split, expected
):
  """All, a number, or by itself a quarter of the tokens trained on, by hand."""
  config = tiny_config(
    num_steps=steps, eval_batches=eval_batches, final_eval_tokens=asked
  )
  assert finish.final_tokens(config, _BATCH, split) == expected


def _run(cache_dir, workdir, **train) -> tuple[dict, str]:
  """A run of one step: its evaluation as it is on disk, and what it printed."""
  config = tiny_config(num_steps=1, eval_every=1, **train)
  config.data.cache_dir = cache_dir
  out = io.StringIO()
  loop.train(config, workdir, devices=jax.devices()[:1], stream=out)
  return json.loads((workdir / "eval.json").read_text()), out.getvalue()


@pytest.mark.slow
def test_a_bounded_evaluation_says_so_wherever_its_loss_stands(
  cache_dir, compilation_cache, tmp_path, monkeypatch
):
  """300 tokens are two batches of 256. File, summary, progress line and picture say it,
  and the baselines are of the same bytes; without sample and picture where not wanted.
  """
  monkeypatch.setattr(progress, "PHASE_SECONDS", 0.0)
  final, out = _run(
    cache_dir,
    tmp_path,
    eval_batches=1,
    final_eval_tokens=300,
    sample=False,
    report=False,
  )
  assert final["tokens"] == 2 * _BATCH < final["split_tokens"]
  split = f"{final['split_tokens']:,}"
  assert f"(first 512 of {split} tokens)" in out
  [line] = writers.read(tmp_path / writers.METRICS_FILE)
  assert (line["validation_num_tokens"], line["validation_split_tokens"]) == (
    _BATCH,
    final["split_tokens"],
  )
  steps = [s for s in out.splitlines() if s.startswith("step 1/1")]
  assert "(first 256 of " in steps[-1]
  # Each part that can be long was shown while it went on.
  for phase in ("validation, tokens", "final evaluation, tokens", "xz -9"):
    assert any(s.startswith(phase) for s in out.splitlines()), phase
  config = tiny_config()
  config.data.cache_dir = cache_dir
  text = b"".join(data.load(config.data).raw_bytes("validation"))[: final["bytes"]]
  packed = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
  xz = final["baselines"]["xz"]["bits_per_byte"]
  assert xz == pytest.approx(8 * packed / len(text))
  assert "sample" not in final and not (tmp_path / "report.png").exists()


def test_a_whole_evaluation_says_all_and_leaves_a_sample_and_a_picture(
  cache_dir, compilation_cache, tmp_path
):
  """What a run does unless told otherwise; nothing it does takes ten seconds here."""
  final, out = _run(cache_dir, tmp_path, eval_batches=0)
  assert final["tokens"] == final["split_tokens"]
  assert f"(all {final['tokens']:,} tokens)" in out
  assert final["sample"]["prompt"] and (tmp_path / "report.png").exists()
  assert "final evaluation" not in out


def test_the_evaluation_is_on_disk_before_the_sample(
  cache_dir, compilation_cache, tmp_path, monkeypatch
):
  """A sample needs the whole model on one device, and may be what does not fit."""

  def fails(run):
    raise MemoryError

  monkeypatch.setattr(finish, "sample", fails)
  with pytest.raises(MemoryError):
    _run(cache_dir, tmp_path, eval_batches=1, report=False)
  assert json.loads((tmp_path / "eval.json").read_text())["loss"] > 0


def test_a_phase_is_a_line_every_ten_seconds(monkeypatch):
  """By a clock that goes 4 s a call: the first line after 12 s, then every 12 s."""
  now = iter(range(0, 10_000, 4))
  monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
  out = io.StringIO()
  reporter = progress.Lines(1, out)
  times = []
  with progress.watched(reporter, "text", 100) as at:
    for done in range(10, 100, 10):
      before = out.getvalue()
      at(done)
      times.append(out.getvalue() != before)
  lines = out.getvalue().splitlines()
  assert lines and all(line.startswith("text  ") for line in lines)
  assert 1 < len(lines) < len(times) and not times[0]
  assert reporter._phase is None


def test_a_bar_shows_phases_beside_the_steps_and_drops_them_when_over():
  """Also one that is left by an exception, and one whose total was an estimate."""
  out = io.StringIO()
  bar = progress.Bar(10, Console(file=out, force_terminal=True, width=100))
  bar.update(1, {"loss": 2.0})
  with pytest.raises(KeyError), progress.watched(bar, "validation", 100) as at:
    at(150)
    assert len(bar._progress.tasks) == 2
    bar._progress.refresh()
    raise KeyError
  assert [task.description for task in bar._progress.tasks] == ["step 1/10"]
  bar.close()
  assert "validation" in out.getvalue()


def test_a_run_whose_last_checkpoint_cannot_be_saved_is_not_done(
  cache_dir, compilation_cache, states, tmp_path, monkeypatch
):
  """It says so, does not evaluate, and goes on from the checkpoint before, exactly."""
  config = tiny_config(num_steps=4, checkpoint_every=2)
  config.data.cache_dir = cache_dir

  def train(name):
    devices, out = jax.devices()[:1], io.StringIO()
    return loop.train(config, tmp_path / name, devices=devices, stream=out)

  def full_at_4(meta):
    if meta["step"] == 4:
      raise OSError(errno.ENOSPC, "No space left on device")
    return pack_meta(meta)

  with monkeypatch.context() as patch:
    patch.setattr(orbax, "pack_meta", full_at_4)
    with pytest.raises(UserError, match=r"of step 4, .*disk is full.* checkpoint 2\."):
      train("full")
  assert states == []
  assert train("full")["start"] == 2
  train("whole")
  jax.tree.map(np.testing.assert_array_equal, *states)
