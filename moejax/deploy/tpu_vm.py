"""A shell script for a slice of Cloud TPU VMs: create, install, train, watch."""

import shlex

from moejax.deploy import machines
from moejax.deploy.job import Job
from moejax.errors import UserError


def script(job: Job) -> str:
  """Returns the script, to be run in a clone.

  Raises:
    UserError: not a TPU that TPU VMs are offered with, several slices, or no zone or
      disk where they are needed.
  """
  topology = job.topology
  if topology.kind not in machines.TPUS:
    raise UserError(
      f"--target=tpu-vm --topology={topology}: give a TPU slice, such as v5p:2x2x4."
    )
  if topology.slices > 1:
    raise UserError(
      f"--target=tpu-vm --slices={topology.slices}: one slice; use --target=gke-tpu for "
      "several."
    )
  if not job.zone:
    raise UserError("--target=tpu-vm: --zone=ZONE is missing, such as us-east5-a.")
  hosts = topology.num_chips // machines.chips_per_host(topology)
  if hosts > 1 and job.needs_disk and not job.share:
    raise UserError(
      f"--target=tpu-vm --topology={topology}: {hosts} machines need one disk for "
      "--workdir. Give its NFS export, such as --share=10.0.0.2:/share, or "
      "--workdir=gs://BUCKET/RUN."
    )
  name, zone = job.name, job.zone
  kind = machines.accelerator_type(topology)
  ssh = f"gcloud compute tpus tpu-vm ssh {name} --zone={zone}"
  queued = "gcloud compute tpus queued-resources"
  spot = " --spot" if job.spot else ""
  return f"""#!/bin/bash
# {topology}: {kind}, {hosts} machine(s). Run it in a clone of moejax.
set -euo pipefail

{queued} create {name} --node-id={name} --zone={zone} \\
  --accelerator-type={kind} --runtime-version={machines.TPUS[topology.kind].runtime}{spot}
until state=$({queued} describe {name} --zone={zone} \\
  --format='value(state.state)') && [ "$state" = ACTIVE ]; do
  case $state in FAILED | SUSPENDED) echo "{name}: $state" >&2; exit 1 ;; esac
  sleep 30
done

git archive --format=tar.gz --prefix=moejax/ -o moejax.tar.gz HEAD
gcloud compute tpus tpu-vm scp moejax.tar.gz {name}: --worker=all --zone={zone}
{ssh} --worker=all --command={shlex.quote(_install(job))}

# On every machine at once: each waits for the others.
{ssh} --worker=all --command={shlex.quote(_train(job))}
{ssh} --worker=0 --command='tail -f moejax/train.log'

# Stop it, which saves first:
#   {ssh} --worker=all --command='pkill -TERM -f moejax'
# Give the machines back:
#   {queued} delete {name} --zone={zone} --force
"""


def _install(job: Job) -> str:
  extras = "tpu" if job.needs_disk else "tpu,gcs"
  lines = ["set -e", "sudo apt-get -qq install -y python3-venv nfs-common"]
  if job.share and job.needs_disk:
    lines.append(
      f"sudo mkdir -p {shlex.quote(job.mount)}; mountpoint -q {shlex.quote(job.mount)} "
      f"|| sudo mount {shlex.quote(job.share)} {shlex.quote(job.mount)}"
    )
  lines += [
    "tar xzf moejax.tar.gz && cd moejax && python3 -m venv .venv",
    f'.venv/bin/pip install -q -c constraints.txt ".[{extras}]"',
  ]
  return "\n".join(lines)


def _train(job: Job) -> str:
  return f"cd moejax && nohup {shlex.join(job.in_venv)} > train.log 2>&1 &"
