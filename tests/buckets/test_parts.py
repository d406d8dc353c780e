"""metrics.jsonl in a bucket: bounded parts that read as the one file."""

import json

import pytest

from moejax.run import writers
from moejax.storage import parts


def lines(steps) -> str:
  return "".join(json.dumps({"step": s, "loss": s / 8}) + "\n" for s in steps)


def write(folder, steps, resume_step=0, flush=True):
  writer = writers.BucketJsonlWriter(folder, resume_step=resume_step)
  for step in steps:
    writer.write(step, {"loss": step / 8})
  if flush:
    writer.close()


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """Parts of some four lines."""
  monkeypatch.setattr(parts, "PART_BYTES", 100)


def test_parts_are_bounded_and_read_as_one_file(folder, tmp_path):
  """The same bytes as of a run on a disk, in objects of bounded size."""
  write(folder, range(1, 31))
  local = writers.JsonlWriter(tmp_path, resume_step=0)
  for step in range(1, 31):
    local.write(step, {"loss": step / 8})
  local.close()
  path = folder / writers.METRICS_FILE
  assert parts.read_text(path) == (tmp_path / writers.METRICS_FILE).read_text()
  assert writers.read(path) == writers.read(tmp_path / writers.METRICS_FILE)
  sizes = [len(part.read_text()) for part in parts.parts(path)]
  assert len(sizes) > 5 and max(sizes) < 100 + len(lines([30]))


@pytest.mark.parametrize("last", [0, 1, 4, 5, 17, 30])
def test_a_resumed_run_repeats_no_step(folder, last):
  """Lines after the checkpoint are dropped, whole parts too, and the rest goes on."""
  write(folder, range(1, 31))
  write(folder, range(last + 1, 33), resume_step=last)
  assert parts.read_text(folder / writers.METRICS_FILE) == lines(range(1, 33))


def test_what_was_not_flushed_is_lost_and_no_more(folder):
  """A crash loses lines since the last write, and never a part of one."""
  write(folder, [1, 2])
  write(folder, [3, 4], resume_step=2, flush=False)
  assert parts.read_text(folder / writers.METRICS_FILE) == lines([1, 2])


def test_lines_appear_without_a_flush_after_some_seconds(folder, monkeypatch):
  """A watcher sees a run between its checkpoints."""
  monkeypatch.setattr(parts, "WRITE_SECONDS", 0.0)
  write(folder, [1, 2], flush=False)
  assert parts.read_text(folder / writers.METRICS_FILE) == lines([1, 2])


def test_event_files_are_copied_and_bounded(folder, monkeypatch):
  """TensorBoard's files are in the bucket after a flush; a large one is followed."""
  monkeypatch.setattr(writers, "_EVENTS_BYTES", 1)
  writer = writers.BucketTensorBoardWriter(folder, resume_step=0)
  writer.write(1, {"loss": 1.0})
  writer.flush()
  writer.write(2, {"loss": 1.0})
  writer.close()
  found = sorted(p.name for p in (folder / writers.TENSORBOARD).iterdir())
  assert len(found) >= 2 and all("tfevents" in name for name in found)


def test_lines_that_another_process_kept_are_put_back_once(folder):
  """Those after the last one that is there; the others are there already."""
  write(folder, range(1, 9))
  kept = lines(range(5, 13)).splitlines()
  writer = writers.BucketJsonlWriter(folder, resume_step=12)
  writer.put_back(kept)
  assert writer.late() == []
  writer.write(13, {"loss": 13 / 8})
  assert writer.late() == lines([13]).splitlines()
  writer.close()
  assert parts.read_text(folder / writers.METRICS_FILE) == lines(range(1, 14))
