"""Runs a sweep of tiny points on Slurm, for tests that start, kill and repeat it.

  python -m tests.sweep.execution.slurm_sweep WORKDIR DATA_CACHE OPTIONS.json

OPTIONS.json has `points`, `train` and `mesh` (of the config) and `options` and `slurm`,
by the names of `schedule.Options` and `SlurmOptions`.
"""

import dataclasses
import hashlib
import json
import pathlib
import sys

from moejax.config import text as config_text
from moejax.errors import UserError
from moejax.sweep.execution import schedule, slurm_run
from moejax.sweep.execution.slurm_options import SlurmOptions
from moejax.sweep.spec import Point
from tests.sweep.execution import runs


def points(cache: str, number: int, mesh: int, train: dict) -> list[Point]:
  """The first points of `runs.points` on a mesh with that size of its data axis."""
  out = []
  for point in runs.points(cache, **train)[:number]:
    point.config.mesh.data = mesh
    text = json.dumps(config_text.to_dict(point.config), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    out.append(dataclasses.replace(point, digest=digest))
  return out


def main() -> int:
  workdir, cache = pathlib.Path(sys.argv[1]), sys.argv[2]
  given = json.loads(pathlib.Path(sys.argv[3]).read_text())
  # The real intervals are kind to a controller that serves a whole cluster.
  slurm_run.EXAMINE_SECONDS, slurm_run.QUEUE_SECONDS = 0.2, 0.5
  options = schedule.Options(
    **{"executor": "slurm", **given.get("options", {})},
    slurm=SlurmOptions(**{"time": "10", **given.get("slurm", {})}),
  )
  made = points(
    cache, given.get("points", 1), given.get("mesh", 1), given.get("train", {})
  )
  try:
    return schedule.run(workdir, made, options=options)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
  sys.exit(main())
