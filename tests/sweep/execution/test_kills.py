"""A sweep whose scheduler and runs are killed again and again ends as if undisturbed."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from moejax.sweep.execution import directory, states
from tests.sweep.execution import runs
from tools import kill_loop

ROOT = pathlib.Path(__file__).parents[3]
KILLS = 5

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells children"),
]


def start(workdir, cache) -> subprocess.Popen[bytes]:
  jobs = str(min(2, os.cpu_count() or 1))
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  command = [
    sys.executable,
    "-m",
    "tests.sweep.execution.runs",
    str(workdir),
    str(cache),
    jobs,
  ]
  quiet = subprocess.DEVNULL
  return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=quiet, stderr=quiet)


def children(workdir) -> list[int]:
  """Process ids of the last attempts that have not ended."""
  found = []
  for run in directory.run_directories(workdir):
    with contextlib.suppress(states.DamagedError):
      attempts = states.read_record(run).get("attempts", [])
      found += [a["pid"] for a in attempts[-1:] if a["exit_code"] is None]
  return found


def logged(workdir) -> int:
  """Bytes of all runs' metrics."""
  return sum(p.stat().st_size for p in workdir.glob("runs/*/metrics.jsonl"))


def disturb(workdir, process, how, rng) -> bool:
  """Kills something after a while; False if the sweep ended before.

  The while is some seconds of the start, or a moment after the next logged step.
  """
  before, deadline = logged(workdir), time.monotonic() + rng.uniform(1, 8)
  if how != "scheduler" or rng.random() < 0.5:
    deadline = float("inf")
  while time.monotonic() < deadline:
    if process.poll() is not None:
      return False
    # A resumed run first cuts its metrics: only what is longer is new.
    if deadline == float("inf") and logged(workdir) > before:
      deadline = time.monotonic() + rng.uniform(0, 1.5)
    before = min(before, logged(workdir))
    time.sleep(0.02)
  if how == "scheduler":
    process.kill()
  else:
    number = signal.SIGKILL if how == "kill" else signal.SIGTERM
    for pid in children(workdir):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
  return True


def files(run) -> set[str]:
  """What the run left, but for the steps of its checkpoints."""
  return {p.name for p in run.iterdir()}


def num_resumed(workdir) -> int:
  logs = (p.read_text() for p in workdir.glob("runs/*/train.log"))
  return sum(text.count("\nResuming ") for text in logs)


def storm(workdir, cache, rng) -> tuple[int, int | None]:
  """Starts a sweep until it is done and disturbs it: (times it was killed, exit code)."""
  kills, code = 0, None
  for attempt in range(40):
    how = ("scheduler", "kill", "term")[attempt % 3]
    with start(workdir, cache) as process:
      if kills < KILLS:
        kills += disturb(workdir, process, how, rng)
      code = process.wait(timeout=900)
    if code == 0:
      break
  return kills, code


def test_killed_at_random_moments_it_ends_with_the_same_losses_and_files(tmp_path):
  """Parameters, optimizer state and every logged loss, bit for bit.

  The scheduler gets kill -9, the runs kill -9 and SIGTERM, in turn.
  """
  rng = random.Random(0)
  calm, cache = tmp_path / "calm", tmp_path / "cache"
  assert start(calm, cache).wait(timeout=900) == 0
  # A sweep that ended before its third kill shows too little: another one then.
  stormy, kills, code, number = tmp_path, 0, None, 0
  while kills < 3 and number < 5:
    stormy, number = tmp_path / f"stormy{number}", number + 1
    kills, code = storm(stormy, cache, rng)
  assert code == 0 and kills >= 3 and num_resumed(stormy) >= 2
  assert [p.name for p in directory.run_directories(stormy)] == [
    p.name for p in directory.run_directories(calm)
  ]
  for run in directory.run_directories(calm):
    other = stormy / "runs" / run.name
    assert kill_loop.compare(run, other) == []
    assert files(run) == files(other)
    first, second = (json.loads((p / "eval.json").read_text()) for p in (run, other))
    assert first["loss"] == second["loss"] and first["step"] == runs.LONG
