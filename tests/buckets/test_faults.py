"""A service that fails now and then, or for good, and processes that die."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

from moejax.checkpoint.inspect import inspect
from moejax.checkpoint.manager import DIRECTORY
from moejax.errors import UserError
from moejax.run import workdir, writers
from moejax.run.files import list_steps
from moejax.storage import errors as storage_errors
from moejax.storage import parts
from moejax.storage.paths import write_bytes
from tests.buckets import emulator, proxy
from tests.checkpoint.test_manager import (
  assert_identical,
  make_state,
  open_checkpoints,
  save_steps,
  shapes,
)
from tests.train.conftest import CORPUS
from tools.kill_loop import SMALL

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def faults(server):
  """Faults between this process and the emulator; none at first."""
  found = proxy.Faults()
  with proxy.started(server, found) as url:
    emulator.use(url)
    _forget()
    yield found
  emulator.use(server)
  _forget()


def _forget():
  """Makes gcsfs look at the environment again."""
  from etils.epath import backend
  from gcsfs import GCSFileSystem

  GCSFileSystem.clear_instance_cache()
  type(backend.fsspec_backend)._get_filesystem.cache_clear()


def test_a_write_waits_out_faults_that_pass(folder, faults):
  """A busy service and a lost answer: the text is there once, and whole."""
  writer = writers.BucketJsonlWriter(folder, resume_step=0)
  for step, fault in enumerate(["", "refused", "lost", "cut"], 1):
    faults.first = [fault] if fault else []
    writer.write(step, {"loss": 1.0})
    writer.flush()
  faults.first = ["cut"]
  found = writers.read(folder / writers.METRICS_FILE)
  assert [line["step"] for line in found] == [1, 2, 3, 4]
  assert faults.met == {"refused": 1, "lost": 1, "cut": 2}


def test_a_removal_whose_answer_is_lost_is_a_removal(folder, faults):
  """The library asks again, and is told that nothing is there."""
  writer = writers.BucketJsonlWriter(folder, resume_step=0)
  writer.write(5, {"loss": 1.0})
  writer.close()
  faults.lost_deletes = 1
  again = writers.BucketJsonlWriter(folder, resume_step=0)
  again.write(1, {"loss": 2.0})
  again.close()
  assert faults.met == {"lost": 1}
  found = writers.read(folder / writers.METRICS_FILE)
  assert [line["step"] for line in found] == [1]


def test_metrics_are_kept_while_the_service_is_down(folder, faults, monkeypatch):
  """Lines that could not be written are said to be late, and written with the next."""
  monkeypatch.setattr(parts, "WRITE_SECONDS", 0.0)
  path = folder / writers.METRICS_FILE
  file = parts.PartsFile(path)
  faults.refused, faults.codes = 1.0, (403,)
  file.append('{"step": 1}\n')
  with pytest.raises(UserError, match="may not use the bucket"):
    file.flush()
  faults.refused = 0.0
  file.append('{"step": 2}\n')
  assert parts.read_text(path) == '{"step": 1}\n{"step": 2}\n'


def test_a_bucket_that_is_full_for_a_while_does_not_end_the_run(folder, faults, caplog):
  """Before a checkpoint: one line, nothing is lost, and nobody takes the run for gone."""
  workdir.claim.lock(folder)
  write_bytes(folder / "config.json", b"{}")
  log = writers.BucketJsonlWriter(folder, resume_step=0)
  log.write(1, {"loss": 1.0})
  faults.full = 507
  with caplog.at_level("WARNING", logger="absl"):
    log.flush()
  assert "the bucket bucket is full" in caplog.text
  faults.full, faults.refused, faults.codes = 0, 1.0, (403,)
  workdir.check_there(folder)
  faults.refused = 0.0
  log.write(2, {"loss": 1.0})
  log.close()
  found = writers.read(folder / writers.METRICS_FILE)
  assert [line["step"] for line in found] == [1, 2]
  (folder / "config.json").unlink()
  with pytest.raises(UserError, match=f"--workdir={folder} was removed"):
    workdir.check_there(folder)
  workdir.release(folder)


def test_a_save_that_is_refused_does_not_end_the_run(folder, faults):
  """One sentence says what is left; the next save works, and nothing partial stays."""
  said = []
  checkpoints = open_checkpoints(folder, warn=said.append)
  states = {step: make_state(seed=step) for step in (1, 2, 3)}
  checkpoints.save(1, states[1], position={"step": 1})
  assert checkpoints.wait()
  faults.refused, faults.codes = 1.0, (403,)
  checkpoints.save(2, states[2], position={"step": 2})
  assert not checkpoints.wait() or said
  faults.refused = 0.0
  assert len(said) == 1 and "may not use the bucket" in said[0]
  assert checkpoints.save(3, states[3], position={"step": 3})
  assert checkpoints.close()
  assert list_steps(folder / DIRECTORY) == [1, 3]


@pytest.mark.slow
def test_checkpoints_wait_out_faults_that_pass(folder, faults):
  """Refusals, lost answers and cut bodies: what is restored is what was saved."""
  faults.refused, faults.lost, faults.cut = 0.05, 0.03, 0.03
  states = save_steps(folder, [1, 2])
  checkpoints = open_checkpoints(folder)
  state, _ = checkpoints.restore(shapes(states[2]))
  checkpoints.close()
  assert_identical(state, states[2])
  assert sum(faults.met.values()) > 3


@pytest.mark.parametrize(
  ("code", "words"),
  [
    (401, "no valid credentials"),
    (403, "may not use the bucket bucket"),
  ],
)
def test_what_the_service_refuses_is_one_line(folder, faults, code, words):
  """Named before anything is written, by flag and with the way out."""
  faults.refused, faults.codes = 1.0, (code,)
  with pytest.raises(UserError, match=f"^--workdir=gs://bucket/.*{words}") as error:
    storage_errors.reach(folder)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("code", "words"),
  [
    (401, "no valid credentials"),
    (403, "may not use the bucket bucket"),
    (507, "is full"),
    (429, "refuses more requests"),
    (503, "does not answer"),
  ],
)
def test_each_library_s_refusal_is_understood(folder, code, words):
  """gcsfs, TensorStore and Google's client name the same refusal in their own ways."""
  from gcsfs.retry import HttpError
  from google.api_core import exceptions

  theirs = [
    HttpError({"code": code, "message": "x"}),
    exceptions.from_http_status(code, "x"),
  ]
  if code == 403:
    theirs += [OSError("Forbidden: x"), ValueError("PERMISSION_DENIED: x")]
  if code == 429:
    theirs += [ValueError("RESOURCE_EXHAUSTED: x")]
  if code == 503:
    theirs += [ValueError("UNAVAILABLE: x")]
  for error in theirs:
    assert words in storage_errors.refusal(error, folder)
  assert storage_errors.refusal(FileNotFoundError("bucket/x"), folder) == ""
  assert storage_errors.refusal(KeyError("x"), folder) == ""


class Trainer:
  """experiments.train in a process of its own, on a small model and text."""

  def __init__(self, workdir, directory, **fields):
    settings = SMALL | {"train.num_steps": 40, "train.eval_every": 0} | fields
    settings |= {"data.path": str(CORPUS), "data.cache_dir": str(directory / "cache")}
    settings |= {"train.sample": False, "train.report": False}
    self._flags = [f"--config.{name}={value}" for name, value in settings.items()]
    self._workdir, self._directory = workdir, directory
    self.process: subprocess.Popen | None = None

  def start(self, *flags, **environment) -> subprocess.Popen:
    variables = os.environ | environment
    variables |= {
      "JAX_COMPILATION_CACHE_DIR": str(self._directory / "xla"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with open(self._directory / "log", "ab") as log:
      return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", f"--workdir={self._workdir}"]
        + [*self._flags, *flags],
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=variables,
      )

  def log(self) -> str:
    return (self._directory / "log").read_text(errors="replace")


def assert_same_run(disk, folder):
  """Parameters, moments and every logged loss of a run on a disk and in the bucket."""
  assert inspect(disk)["sha256_all"] == inspect(folder)["sha256_all"]
  there = writers.read(folder / writers.METRICS_FILE)
  here = writers.read(disk / writers.METRICS_FILE)
  assert [line["step"] for line in there] == [line["step"] for line in here]
  assert [line["loss"] for line in there] == [line["loss"] for line in here]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
  """A run on a disk that nobody disturbed, and where its cache is."""
  directory = tmp_path_factory.mktemp("calm")
  trainer = Trainer(directory / "run", directory)
  assert trainer.start().wait() == 0, trainer.log()
  return directory


@pytest.mark.slow
def test_a_run_killed_at_random_ends_bit_identical(calm, folder):
  """SIGKILL at moments of the start, of steps and of saves; started again each time."""
  trainer, rng = Trainer(folder, calm), random.Random(0)
  kills = 0
  while kills < 8:
    process = trainer.start()
    seen = len(list_steps(folder / DIRECTORY))
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
      if len(list_steps(folder / DIRECTORY)) != seen or kills % 4 == 3:
        # A quiet machine takes two seconds for all steps.
        time.sleep(rng.uniform(0, 0.3))
        break
      time.sleep(0.02)
    if process.poll() is not None:
      assert process.returncode == 0, trainer.log()
      break
    process.kill()
    process.wait()
    kills += 1
  assert kills >= 2
  assert trainer.start().wait() == 0, trainer.log()
  assert_same_run(calm / "run", folder)


@pytest.mark.slow
def test_a_run_through_faults_ends_bit_identical(calm, folder, faults):
  """Five in a hundred requests fail, all are late, and the run does not notice."""
  faults.refused, faults.lost, faults.cut, faults.latency = 0.03, 0.02, 0.02, 0.05
  trainer = Trainer(folder, calm)
  assert trainer.start().wait() == 0, trainer.log()
  assert sum(faults.met.values()) > 10
  faults.refused = faults.lost = faults.cut = faults.latency = 0.0
  assert_same_run(calm / "run", folder)


@pytest.mark.slow
def test_two_processes_train_in_one_bucket(calm, folder):
  """Both write their parts of each checkpoint; one holds the lease."""
  trainer = Trainer(folder, calm, **{"train.num_steps": 8, "mesh.data": 2})
  place = ["--coordinator_address=127.0.0.1:23457", "--num_processes=2"]
  both = [
    trainer.start(*place, f"--process_id={i}", JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo")
    for i in range(2)
  ]
  assert [process.wait() for process in both] == [0, 0], trainer.log()
  assert list_steps(folder / DIRECTORY)[-1] == 8
  assert json.loads((folder / ".lease").read_text())["released"]
