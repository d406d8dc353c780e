"""Several real processes on one machine: exit codes, logs, and the same training."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from moejax.cli import launch_local
from moejax.launch import secret
from tests.experiments.test_command_lines import QUICK

ROOT = pathlib.Path(__file__).parents[2]


def launch(tmp_path, script: str, processes: int = 2) -> int:
  command = [sys.executable, "-c", textwrap.dedent(script)]
  args = [f"--processes={processes}", f"--logs={tmp_path}", "--", *command]
  return launch_local.main(args)


def test_every_process_knows_its_place(tmp_path):
  """Numbers from 0, one address, and the devices asked for."""
  script = """
    import os
    names = "JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JAX_NUM_CPU_DEVICES"
    print(*(os.environ[n] for n in names), os.environ["JAX_COORDINATOR_ADDRESS"])
  """
  assert launch(tmp_path, script, processes=3) == 0
  lines = [(tmp_path / f"process_{i}.log").read_text().split() for i in (1, 2)]
  assert [line[:3] for line in lines] == [["1", "3", "1"], ["2", "3", "1"]]
  assert lines[0][3] == lines[1][3]


def test_each_job_has_a_secret_of_its_own_that_no_command_line_shows(
  tmp_path, monkeypatch
):
  """The same in all processes, another in the next job; one that is given is kept."""
  monkeypatch.delenv(secret.ENV, raising=False)
  script = """
    import os, pathlib
    words = pathlib.Path("/proc/self/cmdline").read_bytes()
    print(os.environ["MOEJAX_JOB_SECRET"])
    assert os.environ["MOEJAX_JOB_SECRET"].encode() not in words
  """
  seen = []
  for job in range(2):
    (tmp_path / str(job)).mkdir()
    assert launch(tmp_path / str(job), script, processes=3) == 0
    logs = [tmp_path / str(job) / f"process_{i}.log" for i in (1, 2)]
    seen.append({log.read_text().strip() for log in logs})
  assert all(len(job) == 1 for job in seen) and seen[0] != seen[1]
  assert all(len(bytes.fromhex(text)) == 32 for job in seen for text in job)
  monkeypatch.setenv(secret.ENV, "a secret that the user gave")
  assert launch(tmp_path, script) == 0
  assert (tmp_path / "process_1.log").read_text().strip() == "a secret that the user gave"


def test_python_is_the_launchers_own(tmp_path, monkeypatch):
  """Also where a virtual environment was not entered, and PATH knows another one."""
  monkeypatch.setenv("PATH", os.defpath)
  command = ["python", "-c", "import sys; print(sys.executable)"]
  assert launch_local.main(["--processes=2", f"--logs={tmp_path}", "--", *command]) == 0
  used = (tmp_path / "process_1.log").read_text().strip()
  assert os.path.dirname(used) == os.path.dirname(sys.executable)


def test_the_first_failure_is_the_exit_code_and_the_others_are_ended(
  tmp_path, capfd, monkeypatch
):
  """Process 1 fails with 7 while process 0 would sleep for ever."""
  monkeypatch.setattr(launch_local, "GRACE_SECONDS", 0.5)
  script = """
    import os, sys, time
    if os.environ["JAX_PROCESS_ID"] == "1":
      print("what went wrong")
      sys.exit(7)
    time.sleep(600)
  """
  assert launch(tmp_path, script) == 7
  err = capfd.readouterr().err
  assert "process 1 ended with exit code 7" in err and "what went wrong" in err


def test_a_killed_process_is_told_by_its_signal(tmp_path, capfd, monkeypatch):
  """128 + 9, as in a shell."""
  monkeypatch.setattr(launch_local, "GRACE_SECONDS", 0.5)
  script = """
    import os, signal, time
    if os.environ["JAX_PROCESS_ID"] == "1":
      os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
  """
  assert launch(tmp_path, script) == 137
  said = capfd.readouterr().err
  assert (
    "process 1 ended with signal SIGKILL (killed from outside, probably out of memory"
    in said
  )


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
  """Four devices in two processes, experts over both, against one device in one.

  Four steps: losses to float32 rounding of sums in another order, the same drops.
  """
  settings = [f"--config.{setting}" for setting in (*QUICK, "train.log_every=1")]
  settings.append(f"--config.data.cache_dir={tmp_path / 'cache'}")

  def train(name: str, *prefix: str, extra: tuple[str, ...] = ()) -> list[dict]:
    workdir = tmp_path / name
    command = [sys.executable, "-m", "experiments.train", f"--workdir={workdir}"]
    subprocess.run([*prefix, *command, *settings, *extra], check=True, cwd=ROOT)
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]

  local = [sys.executable, "-m", "tools.launch_local", "--devices_per_process=2", "--"]
  mesh = ("--config.mesh.expert=2", "--config.mesh.fsdp=2", "--config.mesh.data=1")
  many, one = train("many", *local, extra=mesh), train("one")
  assert len(many) == len(one) > 0
  for a, b in zip(many, one, strict=True):
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert a["dropped_fraction"] == b["dropped_fraction"]
