"""One job of a sweep: it saves, tells Slurm to requeue it, and keeps its record."""

import contextlib
import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from moejax.sweep.execution import (
  slurm_task,
  states,
)
from moejax.sweep.execution.local import Job
from moejax.sweep.execution.states import State
from tests.sweep.execution.slurm_answers import PREEMPTED

CHILD = """
import pathlib, signal, sys, time

def stop(*_):
  step, code = sys.argv[2:]
  if step != "none":
    (pathlib.Path(sys.argv[1]) / "checkpoints" / step).mkdir(parents=True, exist_ok=True)
  sys.exit(int(code))

signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def make_task(tmp_path, monkeypatch):
  """Makes a task whose command saves a step and exits with a code at SIGTERM."""
  monkeypatch.setenv("SLURM_JOB_ID", "7")
  monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
  (tmp_path / "child.py").write_text(CHILD)

  def make(step="2", code=143):
    words = (sys.executable, str(tmp_path / "child.py"), str(tmp_path), step, str(code))
    log = tmp_path / "train.log"
    job = Job(name="a", run=tmp_path, command=words, log=log)
    return slurm_task.Task(job)

  return make


@contextlib.contextmanager
def requeues():
  """Counts calls of the handler that stands in for submitit's."""
  calls = []
  before = signal.signal(signal.SIGUSR2, lambda number, _: calls.append(number))
  try:
    yield calls
  finally:
    signal.signal(signal.SIGUSR2, before)


def tell_when_ready(log: pathlib.Path, *numbers: int) -> None:
  """Sends signals to this process as soon as the command is ready for one."""

  def tell():
    while "ready" not in (log.read_text() if log.exists() else ""):
      time.sleep(0.02)
    for number in numbers:
      os.kill(os.getpid(), number)

  threading.Thread(target=tell).start()


def run_task(task, tmp_path, *numbers):
  (tmp_path / "train.log").unlink(missing_ok=True)
  tell_when_ready(tmp_path / "train.log", *numbers)
  with pytest.raises(SystemExit) as left:
    task()
  return left.value.code


def test_a_job_is_requeued_after_its_run_has_saved(make_task, tmp_path):
  """The record says who ran; a real handler does not return here."""
  with requeues() as calls:
    assert run_task(make_task(), tmp_path, signal.SIGUSR2) == 143
  assert calls == [signal.SIGUSR2]
  (attempt,) = states.read_record(tmp_path)["attempts"]
  assert (attempt["job"], attempt["exit_code"]) == ("7", 143)


@pytest.mark.parametrize(("said", "expected"), [(PREEMPTED, 1), ("", 0)])
def test_sigterm_requeues_only_a_preempted_job(
  make_task, tmp_path, programs, said, expected
):
  """Because scancel sends it as well."""
  (programs / "scontrol.out").write_text(said)
  with requeues() as calls:
    assert run_task(make_task(), tmp_path, signal.SIGTERM) == 143
  assert len(calls) == expected


def test_a_run_that_failed_while_it_was_told_is_not_requeued(make_task, tmp_path):
  with requeues() as calls:
    assert run_task(make_task(code=1), tmp_path, signal.SIGUSR2) == 1
  assert calls == []


def test_a_run_that_never_comes_to_a_checkpoint_is_given_up(make_task, tmp_path):
  """The task is stored with the job, so it counts over its requeues."""
  task = make_task(step="none")
  with requeues() as calls:
    codes = [run_task(task, tmp_path, signal.SIGUSR2) for _ in range(3)]
  assert codes == [143, 143, 1] and len(calls) == 2
  found = states.examine(tmp_path)
  assert found.state is State.FAILED and "--slurm.time" in found.tail[-1]


def test_other_tasks_of_a_job_write_a_log_of_their_own_and_no_record(
  make_task, tmp_path, monkeypatch
):
  monkeypatch.setenv("SLURM_PROCID", "1")
  tell_when_ready(tmp_path / "train.1.log", signal.SIGUSR2)
  with requeues() as calls, pytest.raises(SystemExit):
    make_task()()
  assert calls == [] and states.read_record(tmp_path) == {}
  assert not (tmp_path / "train.log").exists()


def test_the_signal_to_requeue_does_not_reach_the_run(make_task, tmp_path):
  """Slurm sends it to every process of the job, and the default is to die of it."""
  task = make_task()
  log = tmp_path / "train.log"

  def tell():
    while "ready" not in (log.read_text() if log.exists() else ""):
      time.sleep(0.02)
    os.kill(states.read_record(tmp_path)["attempts"][0]["pid"], signal.SIGUSR2)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=tell).start()
  with requeues(), pytest.raises(SystemExit) as left:
    task()
  assert left.value.code == 143
