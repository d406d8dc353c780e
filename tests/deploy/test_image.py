"""The image of docs/launching/Dockerfile: its steps work, and what it holds trains."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from moejax.deploy import gke
from moejax.deploy.job import PYTHON
from tests.deploy import dockerfile
from tests.deploy.jobs import job

ROOT = pathlib.Path(__file__).parents[2]
FILE = ROOT / "docs" / "launching" / "Dockerfile"
SMALL = (
  "model.num_layers=2",
  "model.width=32",
  "model.hidden=32",
  "moe.hidden=32",
  "moe.num_experts=4",
  "moe.group_size=0",
  "data.tokenizer=bytes",
  "data.sequence_length=32",
  "train.batch_size=4",
  "train.num_steps=2",
  "train.eval_batches=1",
)


def succeeds(*command: str) -> bool:
  return not subprocess.run(command, capture_output=True).returncode


def has_docker() -> bool:
  """The client alone, without a daemon that it can reach, builds nothing."""
  return bool(shutil.which("docker")) and succeeds("docker", "info")


def base_python() -> str:
  """The Python of the base image, or that of the tests where it is not installed."""
  [version] = re.findall(r"^FROM python:(\d+\.\d+)", FILE.read_text(), re.MULTILINE)
  name = f"python{version}"
  return name if shutil.which(name) and succeeds(name, "-V") else sys.executable


def training(workdir: str) -> list[str]:
  """The words that a pod of a manifest runs, for a run of two steps."""
  settings = [f"--config.{setting}" for setting in SMALL]
  command = (PYTHON, "-m", "moejax.cli.main", "train", "--config=configs/default.py")
  made = gke.gpu(job("h100:2x8", command=(*command, f"--workdir={workdir}", *settings)))
  [replicated] = made["spec"]["replicatedJobs"]
  [container] = replicated["template"]["spec"]["template"]["spec"]["containers"]
  return container["command"]


def test_what_an_image_does_not_need_stays_outside(tmp_path):
  """Environments, runs and the history; of a directory in the clone, only its caches."""
  clone, image = tmp_path / "clone", tmp_path / "image"
  kept = ("moejax/train/runs.py", "docs/site/page.md", "configs/default.py", ".gitignore")
  left = (".git/HEAD", ".venv-3.12/bin/python", "runs/first/eval.json", "build/lib/a.py")
  left += ("moejax/__pycache__/a.pyc", "moejax.egg-info/PKG-INFO", ".pytest_cache/a")
  for name in (*kept, *left):
    (clone / name).parent.mkdir(parents=True, exist_ok=True)
    (clone / name).touch()
  shutil.copy(ROOT / ".dockerignore", clone)
  (clone / "Dockerfile").write_text("WORKDIR /there\nCOPY . .\n")
  made = dockerfile.Image(image, {})
  dockerfile.build(clone / "Dockerfile", clone, made, {})
  there = {str(p.relative_to(made.cwd)) for p in made.cwd.rglob("*") if p.is_file()}
  assert there == {*kept, ".dockerignore", "Dockerfile"}


def test_steps_see_arguments_and_variables_as_in_docker(tmp_path):
  """ARG has a default and goes no further than the build; ENV stays."""
  file = tmp_path / "Dockerfile"
  file.write_text(
    "FROM a\nARG ONE=1 \nARG TWO=2\nENV SUM=${ONE}+$TWO\nWORKDIR /a\nWORKDIR b\n"
    'RUN echo "$ONE $TWO" \\\n  > said\nENTRYPOINT ["echo", "$SUM"]\n'
  )
  made = dockerfile.Image(tmp_path / "image", {"PATH": os.environ["PATH"]})
  dockerfile.build(file, tmp_path, made, {"TWO": "5"})
  assert (tmp_path / "image" / "a" / "b" / "said").read_text() == "1 5\n"
  assert made.environment == {"PATH": os.environ["PATH"], "SUM": "1+5"}
  assert made.entrypoint == ("echo", "$SUM")
  file.write_text("HEALTHCHECK NONE\n")
  with pytest.raises(ValueError, match="HEALTHCHECK is not known"):
    dockerfile.build(file, tmp_path, made, {})


@pytest.mark.image
@pytest.mark.skipif(has_docker(), reason="docker builds the image itself")
def test_the_steps_of_the_image_install_what_trains(tmp_path):
  """Without docker: in an empty directory, with a new environment and no compiler.

  A pod's command then finds its interpreter, its config and the data.
  """
  subprocess.run([base_python(), "-m", "venv", str(tmp_path / "venv")], check=True)
  path = f"{tmp_path / 'venv' / 'bin'}:/usr/bin:/bin"
  # Settings of pip and proxies are those of this machine. The base image has no compiler.
  mine = {
    k: v for k, v in os.environ.items() if k.startswith("PIP_") or "proxy" in k.lower()
  }
  fresh = {"PATH": path, "HOME": str(tmp_path / "home"), "CC": "false", "CXX": "false"}
  made = dockerfile.Image(tmp_path / "image", mine | fresh)
  dockerfile.build(FILE, ROOT, made, {"EXTRA": ""})
  shown = made.run(*made.entrypoint, "train", "--help")
  assert shown.returncode == 0 and "num_experts" in shown.stdout, shown.stderr
  made.environment["JAX_PLATFORMS"] = "cpu"
  done = made.run(*training(str(tmp_path / "run")))
  shutil.rmtree(tmp_path / "venv")  # Large, and pytest keeps it.
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


@pytest.mark.image
@pytest.mark.skipif(not has_docker(), reason="no docker, or no daemon that it can reach")
def test_docker_builds_an_image_that_trains(tmp_path):
  """The same, with the base image itself."""
  tag = f"moejax-test:{os.getpid()}"
  build = ["docker", "build", "-f", str(FILE), "--build-arg", "EXTRA=", "-t", tag]
  subprocess.run([*build, str(ROOT)], check=True)
  try:
    start = ["docker", "run", "--rm", "--env=JAX_PLATFORMS=cpu"]
    start += [f"--volume={tmp_path}:/runs"]
    shown = subprocess.run(
      [*start, tag, "train", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0 and "num_experts" in shown.stdout, shown.stderr
    program, *words = training("/runs/run")
    subprocess.run([*start, f"--entrypoint={program}", tag, *words], check=True)
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
  finally:
    subprocess.run(["docker", "rmi", tag])
