"""Who started this process as one of several."""

import io
import pathlib
import urllib.error

import pytest

from moejax.launch import distributed


@pytest.fixture
def machine(monkeypatch):
  """(chips, hosts) -> a machine with so many TPU chips, and that answer about hosts."""
  for name in (*distributed._LAUNCHED_BY, "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
  asked = []

  def make(chips: int, hosts: str | None):
    def glob(self, pattern):
      return [self / f"accel{i}" for i in range(chips if pattern == "accel*" else 0)]

    def urlopen(request, timeout):
      asked.append(request.full_url)
      if hosts is None:
        raise urllib.error.URLError("no such machine")
      return io.BytesIO(hosts.encode())

    monkeypatch.setattr(pathlib.Path, "glob", glob)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return asked

  return make


def test_a_tpu_vm_of_a_pod_is_one_of_several(machine):
  """Its shell has no variable that says so; its metadata name the hosts."""
  machine(4, "vm-0:1:10.0.0.1,vm-1:2:10.0.0.2")
  assert distributed.launcher() == "a Cloud TPU pod"


@pytest.mark.parametrize("hosts", ["vm-0:1:10.0.0.1", None])
def test_a_machine_with_chips_of_its_own_is_alone(machine, hosts):
  """One host, or nobody who answers."""
  asked = machine(4, hosts)
  assert distributed.launcher() is None and len(asked) == 1


def test_a_machine_without_chips_asks_nobody(machine):
  """No network at the start of every run on a laptop."""
  asked = machine(0, "a,b")
  assert distributed.launcher() is None and not asked


def test_a_step_of_slurm_with_one_task_is_alone(machine, monkeypatch):
  """With two it is one of several."""
  machine(0, None)
  monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
  assert distributed.launcher() is None
  monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
  assert distributed.launcher() == "Slurm"
