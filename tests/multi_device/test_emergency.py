"""Processes that are killed or told to stop: what is lost, and that the rest is exact."""

import pathlib
import random
import re
import shutil
import signal
import time

import pytest

from moejax.checkpoint.manager import list_steps
from tests.multi_device import test_faults
from tools import kill_loop

pytestmark = pytest.mark.slow

EVERY = 4
LAST = 40
QUICK = (
  f"--config.train.num_steps={LAST}",
  "--config.train.checkpoint_every=0",
  "--config.train.eval_every=0",
  "--config.train.sample=false",
  "--config.train.report=false",
  "--config.train.trace_steps=0",
  "--config.train.final_eval_tokens=100",
)


def local_steps(disk: pathlib.Path, process: int) -> list[int]:
  found = disk.glob(f"run-*/process_{process}/*")
  return sorted(int(path.name) for path in found if path.name.isdecimal())


def resumed(log: str) -> int:
  [step] = re.findall(r"Resuming \S+ at step (\d+)", log)
  return int(step)


class Two:
  """Two processes of one run, each with a disk of its own."""

  def __init__(self, directory: pathlib.Path, *extra: str):
    self.directory = directory
    directory.mkdir(exist_ok=True)
    self.disks = [directory / "disk_0", directory / "disk_1"]
    self.extra = (*QUICK, "--config.train.log_every=1", *extra)

  def start(self, *extra: str) -> test_faults.Job:
    """With emergency checkpoints."""
    flags = {
      str(index): [f"--emergency_local_dir={disk}", f"--emergency_every={EVERY}"]
      for index, disk in enumerate(self.disks)
    }
    return test_faults.train(self.directory, *self.extra, *extra, per_process=flags)

  def newest(self) -> int:
    return min(
      max(local_steps(disk, index), default=0) for index, disk in enumerate(self.disks)
    )


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> pathlib.Path:
  """The run of two processes that nothing disturbs, without emergency checkpoints."""
  directory = tmp_path_factory.mktemp("calm")
  with test_faults.train(directory, *QUICK, "--config.train.log_every=1") as job:
    assert job.codes(300) == [0, 0]
  return directory / "run"


def test_two_processes_killed_twice_end_bit_identical(calm, tmp_path):
  """Each on a disk of its own, and no other checkpoint: the common newest step counts.

  After the second kill, process 1 has lost the newest that both had.
  """
  two = Two(tmp_path / "two")
  with two.start() as job:
    job.wait_for(lambda: two.newest() >= 2 * EVERY, 300)
    job.processes[1].kill()
    assert job.codes() == [3, -signal.SIGKILL]
  common = two.newest()
  with two.start() as job:
    job.wait_for(lambda: "Resuming" in job.log(0), 300)
    assert resumed(job.log(0)) == common
    assert "disk_0" in job.log(0) and "comes from" in job.log(0)
    job.wait_for(lambda: two.newest() >= common + 2 * EVERY, 300)
    job.processes[0].kill()
    job.codes()
  common = two.newest()
  [lost] = two.disks[1].glob(f"run-*/process_1/{common}")
  shutil.rmtree(lost)
  assert list_steps(tmp_path / "two" / "run" / "checkpoints") == []
  with two.start() as job:
    assert job.codes(300) == [0, 0]
    assert resumed(job.log(0)) == common - EVERY
  assert kill_loop.compare(calm, tmp_path / "two" / "run") == []
  assert [list(disk.iterdir()) for disk in two.disks] == [[], []]


def test_sigterm_to_one_of_two_stops_both_at_the_next_step(tmp_path):
  """Not at the next logged one; nothing is lost, and both say 143."""
  two = Two(tmp_path / "two", "--config.train.num_steps=4000")
  with two.start("--config.train.log_every=4000") as job:
    job.wait_for(lambda: two.newest() >= EVERY, 300)
    began = time.monotonic()
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.codes() == [143, 143]
    assert time.monotonic() - began < 30
    [step] = re.findall(r"Stopped at step (\d+) of 4000", job.log(0))
  assert list_steps(tmp_path / "two" / "run" / "checkpoints") == [int(step)]


def test_one_process_killed_loses_at_most_the_steps_between(tmp_path):
  """Twice, without other checkpoints; the end is the same, bit for bit."""
  kill_loop.write_corpus(tmp_path / "corpus", random.Random(0))
  small = kill_loop.SMALL | {
    "data.path": tmp_path / "corpus",
    "data.cache_dir": tmp_path / "data",
  }
  arguments = [f"--config.{name}={value}" for name, value in small.items()] + [*QUICK]

  def trainer(name: str, *extra: str) -> kill_loop.Trainer:
    return kill_loop.Trainer(
      workdir=tmp_path / name, arguments=[*arguments, *extra], cache=tmp_path / "jax"
    )

  disk = tmp_path / "disk"
  run = trainer("run", f"--emergency_local_dir={disk}", f"--emergency_every={EVERY}")
  log = tmp_path / "run.log"
  seen = 0
  for delay in (0.0, 0.05):
    run.start()
    goal = seen + 2 * EVERY
    assert run.wait_until(lambda goal=goal: max(local_steps(disk, 0), default=0) >= goal)
    time.sleep(delay)
    run.kill()
    done = max(kill_loop.losses(tmp_path / "run"), default=0)
    seen = max(local_steps(disk, 0))
    # One save may still have been written while the next steps were taken.
    assert done - seen <= 2 * EVERY
  run.start()
  run.wait_until(lambda: False)
  assert len(re.findall("Resuming", log.read_text())) == 2
  calm = trainer("calm")
  calm.start()
  calm.wait_until(lambda: False)
  assert kill_loop.compare(tmp_path / "calm", tmp_path / "run") == []
