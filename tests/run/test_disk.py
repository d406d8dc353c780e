"""Disks that fill up, and files that cannot be written: said once, and nothing hangs."""

import contextlib
import resource
import shutil
import signal
import time
import types
from typing import Any

import pytest
from tensorboardX.proto import event_pb2

from moejax.config import Config
from moejax.errors import UserError
from moejax.run import disk, events, writers

proto: Any = event_pb2


@contextlib.contextmanager
def file_limit(num_bytes: int):
  """The kernel refuses longer files, as a full disk does: after a part was written."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def said(monkeypatch):
  """Warnings, as they are logged."""
  found = []

  def warning(text, *values):
    found.append(text % values)

  monkeypatch.setattr(writers.logging, "warning", warning)
  return found


def test_lines_that_a_full_disk_refuses_are_written_later(tmp_path, said):
  """In order, each once, also the one of which a half was written; one line says it."""
  writer = writers.JsonlWriter(tmp_path, resume_step=0)
  writer.write(1, {"loss": 1.0})
  with file_limit(40):
    writer.write(2, {"loss": 2.0})
    writer.write(3, {"loss": 3.0})
    assert [line["step"] for line in writers.read(writer.path)] == [1]
  writer.write(4, {"loss": 4.0})
  writer.close()
  assert [line["step"] for line in writers.read(writer.path)] == [1, 2, 3, 4]
  assert writer.path.read_text().count("\n") == 4
  assert len(said) == 1 and "cannot be written for now" in said[0]


def test_a_log_that_was_removed_ends_the_run(tmp_path):
  """Else the lines of hours would go nowhere."""
  (tmp_path / "run").mkdir()
  writer = writers.JsonlWriter(tmp_path / "run", resume_step=0)
  writer.write(1, {"loss": 1.0})
  shutil.rmtree(tmp_path / "run")
  with pytest.raises(UserError, match=r"--workdir=.*run was removed .*starts again"):
    writer.write(2, {"loss": 1.0})
  with pytest.raises(UserError, match="was removed"):
    writer.close()


def test_a_log_alone_that_was_removed_leaves_the_checkpoints(tmp_path):
  """The run's config is there, so that its directory was not removed."""
  (tmp_path / "config.json").write_text("{}")
  writer = writers.JsonlWriter(tmp_path, resume_step=0)
  (tmp_path / "metrics.jsonl").unlink()
  with pytest.raises(UserError, match="lost metrics.jsonl.*continues from the newest"):
    writer.write(1, {"loss": 1.0})
  with pytest.raises(UserError, match="lost metrics.jsonl"):
    writer.close()


def records(directory) -> list[Any]:
  """Events of the one file there: a length, its checksum, the event, its checksum."""
  (file,) = directory.iterdir()
  data, found = file.read_bytes(), []
  while data:
    size = int.from_bytes(data[:8], "little")
    found.append(proto.Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  return found


def test_events_are_written_whatever_the_clock_does(tmp_path, monkeypatch):
  """Set back by ten years in the middle, which a timer cannot wait for."""
  clock = [2e9]
  monkeypatch.setattr(time, "time", lambda: clock[0])
  file = events.EventFile(str(tmp_path), purge_step=3)
  for step in range(3, 33):
    clock[0] += 1.0 if step != 10 else -3650 * 86_400.0
    file.scalar("loss", step / 2, step)
  file.close()
  found = records(tmp_path)
  assert found[0].file_version == "brain.Event:2"
  assert found[1].session_log.status == proto.SessionLog.START
  assert found[1].step == 3
  values = {e.step: e.summary.value[0].simple_value for e in found[2:]}
  assert values == {step: step / 2 for step in range(3, 33)}


def test_events_on_a_full_disk_end_with_one_line(tmp_path, said):
  """And do not make the run wait, however many follow."""
  file = events.EventFile(str(tmp_path))
  with file_limit(200):
    for step in range(1, 300):
      file.scalar("loss", 1.0, step)
    file.flush()
  file.scalar("loss", 1.0, 300)
  file.close()
  assert len(said) == 1 and "nothing more is added" in said[0]


def test_a_run_that_will_not_fit_is_refused(tmp_path, monkeypatch):
  """By what is free and what the run holds already; the line names the way out."""
  usage = types.SimpleNamespace(total=100_000_000, free=2_000_000)
  monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
  config = Config()
  config.train.num_steps, config.train.log_every = 1000, 100
  config.train.keep_last, config.train.keep_best = 2, 1
  with pytest.raises(UserError, match="4 checkpoints of 1.1 MB.*keep_last=2") as error:
    disk.foresee(config, tmp_path, 1_000_000)
  assert "\n" not in str(error.value) and "2.0 MB are free" in str(error.value)
  (tmp_path / "held").write_bytes(b"x" * 3_000_000)
  text = disk.foresee(config, tmp_path, 1_000_000)
  assert "4 checkpoints of 1.1 MB" in text and "2.0 MB are free" in text


def test_a_file_system_that_does_not_tell_refuses_nothing(tmp_path, monkeypatch):
  usage = types.SimpleNamespace(total=0, free=0)
  monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
  assert disk.foresee(Config(), tmp_path, 10**15).endswith("of logs.")
