"""Jobs for tests of what describes them."""

from typing import Any

from moejax.deploy.job import PYTHON, Job
from moejax.plan import topology


def job(machine: str, slices: int = 1, **fields: Any) -> Job:
  """A job on a machine, with everything that some target needs."""
  given = {
    "name": "first",
    "command": (PYTHON, "-m", "moejax.cli.main", "train", "--workdir=/runs/it's a"),
    "workdir": "/runs/first",
    "image": "registry/moejax:1",
    "zone": "us-east5-a",
    "share": "10.0.0.2:/share",
  } | fields
  return Job(topology=topology.parse(machine, slices), **given)
