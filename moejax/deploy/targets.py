"""The places where a job can be started, by name, with what renders and submits it."""

import dataclasses
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import yaml

from moejax.deploy import gke, schemas, slurm, tpu_vm
from moejax.deploy.job import Job
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """One kind of place where a job can be started."""

  render: Callable[[Job], str]
  """Returns the text that describes the job to it."""
  submit: tuple[str, ...]
  """Command that reads that text and starts the job."""
  needs: tuple[str, ...] = ()
  """Other programs that the text calls."""
  begins: str = ""
  """Line that separates the texts of several jobs."""
  suffix: str = ""
  """Suffix of a file with one job; empty if one file may hold several."""


def _manifest(make: Callable[[Job], dict[str, Any]]) -> Callable[[Job], str]:
  def render(job: Job) -> str:
    jobset = make(job)
    if schemas.available():
      schemas.validate(jobset)
    return yaml.safe_dump(jobset, sort_keys=False, width=88)

  return render


_KUBECTL = ("kubectl", "apply", "-f", "-")

TARGETS = {
  "gke-tpu": Target(render=_manifest(gke.tpu), submit=_KUBECTL, begins="---\n"),
  "gke-gpu": Target(render=_manifest(gke.gpu), submit=_KUBECTL, begins="---\n"),
  "slurm": Target(render=slurm.script, submit=("sbatch",), suffix=".sbatch"),
  "tpu-vm": Target(
    render=tpu_vm.script, submit=("bash", "-s"), needs=("gcloud", "git"), suffix=".sh"
  ),
}


def submit(target: str, text: str) -> int:
  """Gives the text to the program that starts the job; returns its exit code.

  Args:
    target: a key of `TARGETS`.
    text: the rendered text.

  Raises:
    UserError: a program is not installed.
  """
  command = TARGETS[target].submit
  for name in (*TARGETS[target].needs, command[0]):
    if shutil.which(name) is None:
      raise UserError(
        f"--submit: {name} is not on the PATH. Install it, or leave --submit out and "
        f"give the text to {' '.join(command)} where it is installed."
      )
  return subprocess.run(command, input=text, text=True, check=False).returncode
