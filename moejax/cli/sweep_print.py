"""`--executor=print --target=...`: the job of each run, for machines of others.

Manifests are printed to standard output one after another, as kubectl reads them. Each
script must be a separate file, so scripts are written to WORKDIR/jobs, and the commands
that start them are printed.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from absl import flags

from moejax import files
from moejax.cli import launch
from moejax.errors import UserError
from moejax.sweep.execution.local import Job
from moejax.sweep.spec import Point

if TYPE_CHECKING:
  from moejax.deploy.job import Job as Rendered

JOBS = "jobs"
"""Directory of the scripts, inside the sweep's."""


def renderer(points: Sequence[Point]) -> Callable[[Job], str]:
  """Returns a function that renders a run; prints once where the runs' files must be.

  Args:
    points: of the sweep; every one must fit the machine.

  Raises:
    UserError: a point does not fit, or a flag is missing.
  """
  from moejax.cli import launch_places
  from moejax.deploy import gke
  from moejax.deploy import job as job_lib
  from moejax.deploy.targets import TARGETS

  name_of_target = flags.FLAGS.target
  target, warned, base = TARGETS[name_of_target], [], points[0].config
  if name_of_target == "tpu-vm" and not flags.FLAGS.share:
    raise UserError(
      "--target=tpu-vm: the runs read their configs in --workdir, which the machines do "
      "not have. Give its disk's NFS export, such as --share=10.0.0.2:/share, and run "
      "this on that disk."
    )

  def render(run: Job) -> str:
    words = [job_lib.PYTHON if word == sys.executable else word for word in run.command]
    trains = "train" in words[:4]  # An evaluation reads its run's config unchanged.
    if name_of_target.startswith("gke") and trains and not base.data.cache_dir:
      words.append(f"--config.data.cache_dir={gke.CACHE}")
    name, _, digest = run.run.name.rpartition("-")
    name = job_lib.name_of(flags.FLAGS["name"].value or name, digest)
    made = launch.make_job(words, str(run.run), name)
    if not warned:
      warned.append(made)
      for note in (
        _place(name_of_target, made),
        *launch_places.notes(made, base, name_of_target),
      ):
        print(f"Note: {note}", file=sys.stderr)
    text = target.render(made)
    if not target.suffix:
      return target.begins + text
    path = run.run.parent.parent / JOBS / (run.run.name + target.suffix)
    path.parent.mkdir(exist_ok=True)
    files.write_text(path, text)
    return shlex.join([target.submit[0], str(path)])

  for point in points:
    job_lib.fit(point.config, launch.machine())
  return render


def _place(target: str, job: "Rendered") -> str:
  """Returns where the jobs look for their configs, which were written here."""
  text = (
    "the jobs read the configs that this command has just written to "
    f"{job.workdir.rpartition('/')[0]}, at the same path."
  )
  if target.startswith("gke"):
    return (
      f"{text} They mount the claim {job.claim} at {job.mount}: run this on a machine "
      f"that has that disk at {job.mount}, or copy the directory to it first."
    )
  return f"{text} It must be on a disk that they share with this machine."
