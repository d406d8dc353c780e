"""tools.campaign: it inflicts every kind of fault, and finds what is wrong."""

import collections
import os
import pathlib
import random
import subprocess
import sys
import types
from typing import Any

import pytest

from moejax.errors import UserError
from tools import campaign, campaign_faults, campaign_jobs, kill_loop

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("place", campaign_faults.FAULTS)
def test_each_kind_of_fault_comes_once_before_any_comes_again(place):
  """Those of the start-up only where nothing was done to the run since it started."""
  drawn = collections.Counter()
  course = campaign.Campaign(random.Random(0), 100, 60.0)
  job: Any = types.SimpleNamespace(place=place, fresh=True)
  kinds = campaign_faults.FAULTS[place]
  for _ in kinds:
    drawn[course._draw(job).name] += 1
  assert drawn == dict.fromkeys((fault.name for fault in kinds), 1)
  job.fresh = False
  moments = {course._draw(job).moment for _ in range(len(kinds) - 1)}
  assert campaign_faults.START not in moments


def test_a_damaged_file_is_another_file(tmp_path):
  """Removed, shortened, or with one other bit: never as it was."""
  whole, ways = bytes(range(200)), set()
  for seed in range(40):
    file = tmp_path / str(seed)
    file.write_bytes(whole)
    campaign_faults._spoil(file, random.Random(seed))
    found = file.read_bytes() if file.exists() else None
    assert found != whole
    ways.add("gone" if found is None else "cut" if len(found) < 200 else "changed")
  assert ways == {"gone", "cut", "changed"}


class Scripted(campaign_jobs.Job):
  """A job whose process is a line of Python in place of the training program."""

  def __init__(self, root, script):
    super().__init__(root, "scripted", [])
    self._script = script

  def start(self):
    with open(self._log, "ab") as log:
      self.processes = [
        subprocess.Popen(
          [sys.executable, "-c", self._script], stdout=log, stderr=log, cwd=ROOT
        )
      ]
    self.mark()
    self.fresh = True


def test_an_exit_code_that_no_fault_explains_is_an_error(tmp_path):
  """With the end of the log."""
  job = Scripted(tmp_path, "print('the reason'); raise SystemExit(7)")
  course = campaign.Campaign(random.Random(0), 100, 60.0)
  with pytest.raises(UserError, match=r"(?s)exit codes \[7\].*the reason"):
    course.disturb(job, 1)
  assert course.done == 0


def test_a_traceback_on_the_way_is_a_problem(tmp_path, monkeypatch):
  """Even if the run ended with the right bits."""
  monkeypatch.setattr(kill_loop, "compare", lambda *_: [])
  job = Scripted(tmp_path, "print('Traceback (most recent call last):')")
  assert campaign._judge(tmp_path, job) == []
  job.start()
  assert job.codes() == [0]
  (problem,) = campaign._judge(tmp_path, job)
  assert problem.startswith("scripted: a traceback")


def test_the_clock_of_a_job_s_processes_is_shifted(tmp_path):
  """While they run, by the file; and only theirs."""
  job = campaign_jobs.Job(tmp_path, "run", [])
  job.clock.write_text("-86400")
  script = "import time; print(time.time())"
  (variables,) = job._variables()
  told = subprocess.check_output([sys.executable, "-c", script], env=variables)
  plain = subprocess.check_output([sys.executable, "-c", script])
  assert float(plain) - float(told) == pytest.approx(86_400, abs=60)


@pytest.mark.slow
def test_a_short_campaign_ends_bit_identical():
  """Nine faults on a disk, which are all of its kinds and one again."""
  done = subprocess.run(
    [sys.executable, "-m", "tools.campaign", "--where=disk", "--faults=9"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  assert "identical after 9 faults" in done.stdout
