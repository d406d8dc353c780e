"""Render the job that trains a config on a pod, a GPU cluster or TPU VMs; submit it.

  python -m tools.launch --target=gke-tpu --topology=v5p:4x4x8 --image=IMAGE \\
    --config=mixtral_8x7b --workdir=/runs/first [--config.SECTION.FIELD=VALUE] [--submit]

Targets are gke-tpu and gke-gpu (a JobSet), slurm (a batch script) and tpu-vm (a shell
script with gcloud). First checks the mesh and the minimum memory against the machine.
The text is printed, or written to --output; nothing is sent anywhere without --submit.
docs/launching.md says what each target needs. On one machine: tools.launch_local.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from moejax import files
from moejax.cli import arguments
from moejax.cli import flags as cli
from moejax.errors import UserError, program
from moejax.storage.paths import check_url, is_url

if TYPE_CHECKING:
  from moejax.deploy.job import Fit, Job
  from moejax.plan.topology import Topology

_TARGETS = ("gke-tpu", "gke-gpu", "slurm", "tpu-vm")
_NOT_READ = {
  "nodes": "it comes from --topology",
  "tasks_per_node": "it comes from --topology",
  "gpus_per_node": "it comes from --topology",
  "array_parallelism": "it is for sweeps with --executor=slurm",
  "wait": "it is for sweeps with --executor=slurm",
}
"""Slurm options that no job here uses, and why."""

_GKE = ("gke-tpu", "gke-gpu")
_READ_BY = {
  "image": _GKE,
  "claim": _GKE,
  "namespace": _GKE,
  "secret": _GKE,
  "grace_seconds": _GKE,
  "max_restarts": (*_GKE, "slurm"),
  "spot": (*_GKE, "tpu-vm"),
  "zone": ("tpu-vm",),
  "share": ("tpu-vm",),
}
"""Flags that some targets ignore, and the targets that use them."""

_PASSED_ON = (
  "emergency_local_dir",
  "emergency_every",
  "join_timeout",
  "compilation_cache",
)
"""Flags of train that depend on the machine."""


def define_flags() -> None:
  """Defines the flags that describe the machine; a sweep takes the same flags.

  Those of Slurm are in `slurm_options`. --help of the caller's module lists them if it
  adopts this module's key flags.
  """
  text, number = flags.DEFINE_string, flags.DEFINE_integer
  flags.DEFINE_enum("target", None, _TARGETS, "Where the job will run.")
  text("topology", None, "The machine: v5p:4x4x8, v5e:4x4, h100:2x8 (nodes x GPUs).")
  number("slices", 1, "Number of TPU slices of that shape.", 1, 4096)
  text("name", None, "Name of the job; default: made from --config and --workdir.")
  text("image", "", "Kubernetes: container image.")
  text(
    "claim", "moejax-runs", "Kubernetes: claim of the shared disk that holds --workdir."
  )
  text("namespace", "", "Kubernetes: namespace; default: that of kubectl's context.")
  text(
    "secret", "", "Kubernetes: Secret with the key `secret`, with which processes meet."
  )
  number(
    "max_restarts", 100, "Kubernetes, Slurm: maximum restarts of a job.", 0, 1_000_000
  )
  number("grace_seconds", 300, "Kubernetes: time to save when preempted.", 1, 86_400)
  flags.DEFINE_bool("spot", False, "Use machines that may be reclaimed at any time.")
  text("zone", "", "tpu-vm: zone of Google Cloud.")
  text("share", "", "tpu-vm: NFS export of the shared disk, ADDRESS:/PATH.")


def machine() -> Topology:
  """Returns the machine of --topology and --slices.

  Raises:
    UserError: the name is unknown, or no machine is given.
  """
  from moejax.deploy import machines
  from moejax.plan import topology

  if not flags.FLAGS.topology:
    raise UserError("--topology is missing: the machine, such as v5p:4x4x8 or h100:2x8.")
  found = topology.parse(flags.FLAGS.topology, flags.FLAGS.slices)
  machines.check_shape(found)
  return found


def make_job(command: list[str], workdir: str, name: str) -> Job:
  """Returns the job of this command line.

  Args:
    command: words, beginning with the interpreter.
    workdir: of the run.
    name: of the job.

  Raises:
    UserError: a flag is missing, or is not for this target.
  """
  from moejax.deploy.job import Job, checked_name
  from moejax.sweep.execution import slurm_options

  given = flags.FLAGS
  slurm = slurm_options.given()
  if slurm and given.target != "slurm":
    raise UserError(f"--{slurm[0]} is only read with --target=slurm.")
  for flag in slurm:
    if reason := _NOT_READ.get(flag.removeprefix("slurm.")):
      raise UserError(f"--{flag} is not read here: {reason}.")
  _refuse_unread(given)
  options: dict[str, Any] = {
    field.name: given[field.name].value
    for field in dataclasses.fields(Job)
    if field.name in given and field.name not in ("name", "workdir", "topology")
  }
  return Job(
    name=checked_name(name),
    command=tuple(command),
    topology=machine(),
    workdir=workdir,
    slurm=slurm_options.from_flags(),
    **options,
  )


def refuse_without_target() -> None:
  """Refuses flags that describe a job's machine, in a program that renders no job."""
  for name in ("topology", "slices", "name", *_READ_BY):
    if flags.FLAGS[name].present:
      raise UserError(
        f"--{name} is only read with --executor=print --target={'|'.join(_TARGETS)}. Add "
        "them, or leave it out."
      )


def _refuse_unread(given: flags.FlagValues) -> None:
  for flag, targets in _READ_BY.items():
    if given[flag].present and given.target not in targets:
      raise UserError(
        f"--{flag} is not read with --target={given.target}, only with "
        f"{', '.join(targets)}. Leave it out."
      )


def main() -> int:
  from moejax.cli import launch_places
  from moejax.deploy import job as job_lib
  from moejax.deploy import schemas
  from moejax.deploy.targets import TARGETS, submit

  given = flags.FLAGS
  if not given.target:
    raise UserError(f"--target is missing: one of {', '.join(_TARGETS)}.")
  if not given.workdir:
    raise UserError("--workdir=DIR is missing: where the run's files go, on the machine.")
  if is_url(given.workdir):
    check_url(given.workdir)
  if given.emergency_every and not given.emergency_local_dir:
    raise UserError(
      f"--emergency_every={given.emergency_every} needs --emergency_local_dir=DIR."
    )
  if given.output:
    arguments.writable_file(pathlib.Path(given.output), "--output")
  name = given["name"].value or _name(given.config, given.workdir)
  job = make_job([], given.workdir, name)
  disk = launch_places.disk_of(job, given.target)
  config, file = launch_places.config_there(given.config, given.target, disk)
  job = dataclasses.replace(job, command=tuple(_command(config)), config_file=file)
  text = TARGETS[given.target].render(job)  # Refuses what the target does not offer.
  config = cli.get_config()
  print(_summary(job, job_lib.fit(config, job.topology)), file=sys.stderr)
  for note in launch_places.notes(job, config, given.target):
    print(f"Note: {note}", file=sys.stderr)
  if given.target.startswith("gke") and not schemas.available():
    print(
      "Not checked against the schemas of Kubernetes: that needs the extra kubernetes.",
      file=sys.stderr,
    )
  if given.output:
    files.write_text(given.output, text)
  elif not given.submit:
    print(text, end="")
  if given.submit:
    return submit(given.target, text)
  written = f"Wrote {given.output}. " if given.output else ""
  print(f"{written}Nothing was submitted (--submit does that).", file=sys.stderr)
  return 0


def _name(config: str, workdir: str) -> str:
  """Returns the job name of a run, unlike those of its config's other runs."""
  from moejax.deploy import job as job_lib

  # Slurm numbers its jobs; elsewhere a second job of the same name replaces the first.
  is_unique = flags.FLAGS.target != "slurm"
  digest = hashlib.sha256(workdir.encode()).hexdigest()[:6] if is_unique else ""
  return job_lib.name_of(f"moejax-{pathlib.Path(config).stem}", digest)


def _command(config: str) -> list[str]:
  """Returns the words that train this command line's config.

  Args:
    config: value of --config in the place where the job runs.
  """
  from moejax.deploy.gke import CACHE
  from moejax.deploy.job import PYTHON

  given, settings = flags.FLAGS, cli.overrides()
  if given.target in _GKE and not cli.get_unchecked_config().data.cache_dir:
    settings = {"data.cache_dir": CACHE} | settings
  words = [PYTHON, "-m", "moejax.cli.main", "train", f"--config={config}"]
  words.append(f"--workdir={given.workdir}")
  words += [f"--{name}={given[name].value}" for name in _PASSED_ON if given[name].present]
  return words + [
    f"--config.{name}={cli.spelled(value)}" for name, value in settings.items()
  ]


def _summary(job: Job, fit: Fit) -> str:
  mesh = " x ".join(f"{axis} {size}" for axis, size in fit.mesh.items() if size > 1)
  slices = f" x {job.topology.slices} slices" if job.topology.slices > 1 else ""
  said = f"{job.name}: {job.topology}{slices}, {fit.devices} devices as {mesh or 'one'}."
  if not fit.device_bytes:
    return said
  ask = program("compile-for", "tools.compile_for")
  return (
    f"{said} Each needs at least {fit.least_bytes / 1e9:.2f} of its "
    f"{fit.device_bytes / 1e9:.1f} GB; {ask} asks the compiler."
  )


def _define_passed_on() -> None:
  """Defines `_PASSED_ON`; values that train would refuse later are refused here."""
  text = "Passed on to train: "
  flags.DEFINE_string(
    "emergency_local_dir",
    "",
    f"{text}directory of frequent checkpoints, on each machine's own disk.",
  )
  flags.DEFINE_integer(
    "emergency_every", None, f"{text}steps between them.", 0, 2**31 - 1
  )
  flags.DEFINE_float(
    "join_timeout", None, f"{text}seconds to wait for other processes.", 0, 30 * 86_400
  )
  flags.DEFINE_string(
    "compilation_cache", "", f"{text}shared directory of compiled programs, or none."
  )


def run() -> None:
  """Runs the program."""
  from moejax.sweep.execution import slurm_options

  cli.define_config()
  define_flags()
  slurm_options.define_flags()
  _define_passed_on()
  flags.DEFINE_string("output", None, "Write the text to this file.")
  flags.DEFINE_bool("submit", False, "Give the text to kubectl, sbatch or bash.")
  cli.run(main, buckets=("workdir",))


if __name__ == "__main__":
  run()
