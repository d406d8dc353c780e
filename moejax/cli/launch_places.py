"""Checks whether the files that a job's command names here also exist for the job."""

import pathlib
from collections.abc import Iterator

from moejax.cli import listing
from moejax.config import Config
from moejax.deploy.job import Job
from moejax.errors import UserError

_SPOT_SECONDS = 15
"""Time that GKE gives a pod when a Spot machine is taken (GKE's page "Spot VMs")."""


def disk_of(job: Job, target: str) -> str:
  """Returns the path of the job's disk if this machine may share it; else empty."""
  has_disk = target.startswith("gke") or (target == "tpu-vm" and bool(job.share))
  return job.mount if has_disk and job.needs_disk else ""


def config_there(given: str, target: str, disk: str) -> tuple[str, str]:
  """Returns --config for the job, and the file that must be sent with the clone.

  Args:
    given: --config of this command line, which can be read here.
    target: of the job.
    disk: see `disk_of`.

  Returns:
    The value of --config for the job; the file's path in the clone, empty if the machines
    need no such file.

  Raises:
    UserError: the file is only on this machine, so the job will not find it.
  """
  if target == "slurm" or not pathlib.Path(given).is_file():  # Or a shipped name.
    return given, ""
  here, clone = pathlib.Path(given).resolve(), pathlib.Path.cwd()
  if disk and here.is_relative_to(disk):
    return str(here), ""
  inside = here.relative_to(clone).as_posix() if here.is_relative_to(clone) else ""
  if target == "tpu-vm" and inside:
    return inside, inside
  shipped = {file.resolve(): name for name, file in listing.shipped_configs().items()}
  if here in shipped:
    name = shipped[here]
    return (inside if inside == f"configs/{name}.py" else name), ""
  shared = f", or put it on the shared disk, below {disk}" if disk else ""
  if target == "tpu-vm":
    raise UserError(
      f"--config={given}: only what is committed in this directory's clone is sent to "
      f"the machines. Copy it to configs/ and commit it{shared}."
    )
  raise UserError(
    f"--config={given}: the image has the shipped configs only (--list=configs). Copy it "
    f"to configs/ and build the image again{shared}."
  )


def notes(job: Job, config: Config, target: str) -> Iterator[str]:
  """Yields a line for each thing that may differ between here and there."""
  disk, path = disk_of(job, target), config.data.path
  shared = bool(disk) and pathlib.Path(path).is_relative_to(disk)
  if target != "slurm" and path and not shared:
    only = f"the shared disk {disk} and " if disk else ""
    what = "the image" if target.startswith("gke") else "the machine"
    yield (
      f"--config.data.path={path} is not sent from here: the job reads it there, where "
      f"only {only}{what}'s own files exist."
    )
  if job.spot and target.startswith("gke") and job.grace_seconds > _SPOT_SECONDS:
    yield (
      f"--spot: GKE gives a pod about {_SPOT_SECONDS} seconds when a Spot machine is "
      f"reclaimed, not --grace_seconds={job.grace_seconds}. A save that takes longer is "
      "lost: lower --config.train.checkpoint_every."
    )
