"""What a job's command names on this machine: told as it is there, or refused."""

import pathlib

import pytest

from moejax.cli import launch_places
from moejax.config import Config
from moejax.errors import UserError
from tests.deploy.jobs import job

ROOT = pathlib.Path(__file__).parents[2]
DEFAULT = "configs/default.py"


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
  ("given", "target", "there"),
  [
    (DEFAULT, "gke-tpu", (DEFAULT, "")),
    ("default", "gke-tpu", ("default", "")),
    (f"{ROOT}/{DEFAULT}", "gke-gpu", (DEFAULT, "")),
    (DEFAULT, "tpu-vm", (DEFAULT, DEFAULT)),
    (f"{ROOT}/{DEFAULT}", "tpu-vm", (DEFAULT, DEFAULT)),
    ("default", "tpu-vm", ("default", "")),
  ],
)
def test_a_config_has_the_name_that_it_has_there(given, target, there):
  """And a clone must bring the file to TPU VMs, from its last commit."""
  assert launch_places.config_there(given, target, "") == there


def test_a_config_of_this_machine_alone_is_refused(tmp_path):
  """But for Slurm, whose machines have this directory, and on the shared disk."""
  file = tmp_path / "mine.py"
  file.write_text("")
  there = launch_places.config_there
  with pytest.raises(UserError, match="the image has the shipped configs only"):
    there(str(file), "gke-tpu", "/runs")
  with pytest.raises(UserError, match="only what is committed"):
    there(str(file), "tpu-vm", "")
  assert there(str(file), "slurm", "") == (str(file), "")
  assert there(str(file), "tpu-vm", str(tmp_path)) == (str(file.resolve()), "")


def test_a_config_of_the_clone_that_is_not_shipped_is_not_in_an_image():
  """Though TPU VMs get it."""
  file = "tests/deploy/jobs.py"
  assert launch_places.config_there(file, "tpu-vm", "") == (file, file)
  with pytest.raises(UserError, match="build the image again, or put it on"):
    launch_places.config_there(file, "gke-tpu", "/runs")


def test_data_of_this_machine_and_a_short_notice_are_said():
  """Each in one line, and only where it is so."""
  config, made = Config(), job("v5p:2x2x4", spot=True)
  [spot] = launch_places.notes(made, config, "gke-tpu")
  assert "--grace_seconds=300" in spot and "15 seconds" in spot
  assert not list(launch_places.notes(made, config, "tpu-vm"))
  config.data.path = "/home/me/text"
  [data] = launch_places.notes(made, config, "tpu-vm")
  assert "--config.data.path=/home/me/text is not sent" in data and "\n" not in data
  config.data.path = "/runs/text"
  made = job("v5p:2x2x4", spot=True, grace_seconds=15)
  assert not list(launch_places.notes(made, config, "gke-tpu"))
  assert not list(launch_places.notes(made, config, "slurm"))
  assert len(list(launch_places.notes(job("v5p:2x2x4", share=""), config, "tpu-vm"))) == 1
