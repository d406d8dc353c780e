"""A shell script for a slice of Cloud TPU VMs: create, install, train, watch."""

import shlex

from moejax.deploy import machines
from moejax.deploy.job import Job
from moejax.errors import UserError

# A machine that has just started upgrades itself, and holds apt's lock while it does.
_APT = 'apt="apt-get -qq -o DPkg::Lock::Timeout=300"'


def script(job: Job) -> str:
  """Returns the script, to be run in a clone.

  Raises:
    UserError: a machine not offered as TPU VMs, several slices, or a missing zone or disk
      that is needed.
  """
  topology = job.topology
  if topology.kind not in machines.TPUS:
    raise UserError(
      f"--target=tpu-vm --topology={topology}: give a TPU slice, such as v5p:2x2x4."
    )
  if topology.slices > 1:
    raise UserError(
      f"--target=tpu-vm --slices={topology.slices}: only one slice is possible; use "
      "--target=gke-tpu for several."
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
  runtime = machines.TPUS[topology.kind].runtime
  spot = " --spot" if job.spot else ""
  return f"""#!/bin/bash
# {topology}: {kind}, {hosts} machine(s). Run it in a clone of moejax.
set -euo pipefail
{{ # bash reads this block before it runs it, as ssh would read the rest of the script.

{_check_clone(job)}
# Run again after a fault, it goes on with the machines that it has made.
if ! {queued} describe {name} --zone={zone} > /dev/null 2>&1; then
  {queued} create {name} --node-id={name} --zone={zone} \\
    --accelerator-type={kind} --runtime-version={runtime}{spot}
fi
until state=$({queued} describe {name} --zone={zone} \\
  --format='value(state.state)') && [ "$state" = ACTIVE ]; do
  case $state in FAILED | SUSPENDED) echo "{name}: $state" >&2; exit 1 ;; esac
  sleep 30
done

# Before anything is sent: without a recent Python moejax cannot be installed.
{ssh} --worker=all --command={shlex.quote(_PYTHON)}
gcloud compute tpus tpu-vm scp "$sent/moejax.tar.gz" {name}: --worker=all --zone={zone}
{ssh} --worker=all --command={shlex.quote(_install(job))}

# On every machine at once: each waits for the others.
{ssh} --worker=all --command={shlex.quote(_train(job))}
{ssh} --worker=0 --command='tail -f moejax/train.log'

# Stop it, which saves first:
#   {ssh} --worker=all --command='pkill -TERM -f moejax'
# Give the machines back:
#   {queued} delete {name} --zone={zone} --force
}}
"""


_PYTHON = f"""set -e
{_APT}
found() {{
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c "import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))" \\
      2> /dev/null; then echo "$python"; return; fi
  done
  return 1
}}
if ! python=$(found); then
  sudo $apt update || true
  for version in 3.12 3.11; do
    if sudo $apt install -y "python$version-venv"; then break; fi
  done
  if ! python=$(found); then
    echo "error: $(hostname) has $(python3 --version 2>&1), and no Python 3.11 or" \\
      "later (with venv) could be installed. Nothing was sent. Install one on every" \\
      "machine, and run this script again." >&2
    exit 2
  fi
fi
"$python" -m venv moejax/.venv"""
"""Makes the environment of a machine, with a Python that moejax supports: Ubuntu 22.04's
default is 3.10, but its packages include 3.11."""


def _check_clone(job: Job) -> str:
  """Returns the lines that pack the clone's last commit, before any machine is made."""
  lines = [
    "sent=$(mktemp -d)",
    "trap 'rm -rf \"$sent\"' EXIT",
    'git archive --format=tar.gz --prefix=moejax/ -o "$sent/moejax.tar.gz" HEAD',
    "changed=$(git status --porcelain | wc -l)",
    'if [ "$changed" -gt 0 ]; then',
    '  echo "Note: the last commit is sent; $changed changed or new file(s)" \\',
    '    "are not." >&2',
    "fi",
  ]
  if job.config_file:
    lines += [
      f"if ! git cat-file -e {shlex.quote(f'HEAD:{job.config_file}')} 2> /dev/null; then",
      f"  echo {shlex.quote(f'error: --config={job.config_file} is not committed.')} >&2",
      "  exit 2",
      "fi",
    ]
  return "\n".join([*lines, ""])


def _install(job: Job) -> str:
  extras = "tpu" if job.needs_disk else "tpu,gcs"
  lines = ["set -e"]
  if job.share and job.needs_disk:
    lines += [_APT, "sudo $apt update", "sudo $apt install -y nfs-common"]
    lines.append(
      f"sudo mkdir -p {shlex.quote(job.mount)}; mountpoint -q {shlex.quote(job.mount)} "
      f"|| sudo mount {shlex.quote(job.share)} {shlex.quote(job.mount)}"
    )
  lines += [
    "tar xzf moejax.tar.gz && cd moejax",
    f'.venv/bin/pip install -q -c constraints.txt ".[{extras}]"',
  ]
  return "\n".join(lines)


def _train(job: Job) -> str:
  return f"cd moejax && nohup {shlex.join(job.in_venv)} > train.log 2>&1 &"
