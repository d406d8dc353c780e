"""A Slurm that prints what a test writes."""

import os

import pytest

from moejax.sweep.execution import slurm_queue
from tests.sweep.execution.slurm_answers import SINFO


@pytest.fixture
def programs(tmp_path, monkeypatch):
  """Puts programs on the PATH that print what is written into a file of their name."""
  place = tmp_path / "bin"
  place.mkdir()
  for name in slurm_queue.PROGRAMS:
    (place / name).write_text(
      f"#!/bin/sh\necho $0 $* >> {place}/calls\ncat {place}/{name}.out"
    )
    (place / name).chmod(0o755)
    (place / f"{name}.out").write_text("")
  (place / "sinfo.out").write_text(SINFO)
  monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
  return place
