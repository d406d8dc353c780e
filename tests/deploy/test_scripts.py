"""Scripts for Slurm and for TPU VMs: sound shell, with every word kept."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from moejax.deploy import machines, slurm, tpu_vm
from moejax.errors import UserError
from moejax.plan import topology
from moejax.sweep.execution.slurm_options import SlurmOptions
from tests.deploy.jobs import job

ROOT = pathlib.Path(__file__).parents[2]


def call(
  text: str, tmp_path, programs: dict[str, str], *arguments: str, **variables: str
) -> subprocess.CompletedProcess:
  """Runs a script with programs that are given as shell lines."""
  place = tmp_path / "bin"
  place.mkdir()
  for name, lines in programs.items():
    (place / name).write_text(f"#!/bin/bash\n{lines}\n")
    (place / name).chmod(0o755)
  env = os.environ | {"PATH": f"{place}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
  return subprocess.run(
    ["bash", "-s", "--", *arguments],
    input=text,
    env=env | variables,
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )


def test_slurm_is_asked_for_a_task_for_each_gpu():
  """And for what the options say; what they do not say is not mentioned."""
  options = SlurmOptions(
    partition="long", time="2-0", cpus_per_task=8, setup=("echo hi",)
  )
  text = slurm.script(job("h100:2x8", slurm=options))
  asked = dict(re.findall(r"#SBATCH --([a-z-]+)=(\S+)", text))
  assert asked == {
    "job-name": "first",
    "nodes": "2",
    "ntasks-per-node": "8",
    "gpus-per-node": "8",
    "cpus-per-task": "8",
    "partition": "long",
    "time": "2-0",
    "signal": "TERM@120",
    "open-mode": "append",
    "output": "first-%j.log",
  }
  assert "\necho hi\n" in text and "SRUN_CPUS_PER_TASK" in text


def codes_in_docs() -> dict[int, bool]:
  """The table of docs/launching.md: exit codes, and whether Slurm's job is requeued."""
  text = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
  rows = re.findall(r"^\| ([\d, ]+) \|.*\| (requeued|ends) *\|$", text, re.MULTILINE)
  return {int(code): said == "requeued" for row, said in rows for code in row.split(",")}


SRUN = 'printf "%s\\n" "$@" > words; exit'
SCONTROL = 'echo "$@" >> requeued'


@pytest.mark.parametrize(
  ("code", "requeued"),
  [
    (0, False),
    (1, False),
    (2, False),
    (3, True),
    (4, False),
    (130, True),
    (134, False),
    (137, True),
    (143, True),
  ],
)
def test_the_job_is_requeued_when_it_can_go_on(tmp_path, code, requeued):
  """By the exit code of srun, which is also the script's, as the docs have it."""
  programs = {"srun": f"{SRUN} {code}", "scontrol": SCONTROL}
  done = call(slurm.script(job("cpu:2")), tmp_path, programs)
  assert done.returncode == code, done.stderr
  assert (tmp_path / "requeued").exists() == requeued == codes_in_docs()[code]
  assert not requeued or (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_srun_gets_every_word(tmp_path):
  """Of the job's command, and of the script's own arguments."""
  programs = {"srun": f"{SRUN} 0", "scontrol": SCONTROL}
  done = call(slurm.script(job("cpu:2")), tmp_path, programs, "--a=b c", "--workdir=/d")
  assert done.returncode == 0, done.stderr
  words = (tmp_path / "words").read_text().splitlines()
  assert words[-3:] == ["--workdir=/runs/it's a", "--a=b c", "--workdir=/d"]
  assert ".venv/bin/python" in words


@pytest.mark.parametrize(
  ("restarts", "given", "requeued"),
  [("", "", True), ("4", "", True), ("5", "", False), ("4", "4", False)],
)
def test_restarts_come_to_an_end(tmp_path, restarts, given, requeued):
  """Slurm counts them, and does not set the variable in a job's first start."""
  told = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
  told |= {"MOEJAX_MAX_RESTARTS": given} if given else {}
  text = slurm.script(job("cpu:2", max_restarts=5))
  programs = {"srun": f"{SRUN} 3", "scontrol": SCONTROL}
  done = call(text, tmp_path, programs, **told)
  assert done.returncode == 3
  assert (tmp_path / "requeued").exists() == requeued
  assert ("error: MOEJAX_MAX_RESTARTS=" in done.stderr) != requeued


def test_tpu_vms_are_made_and_trained_on_in_order(tmp_path):
  """A clone is sent to all, which start the same command, quoted for each shell."""
  gcloud = """echo "$@" >> calls; cat > /dev/null
case "$*" in
  *describe*) grep -q create calls && echo ACTIVE ;;
  *nohup*) command=${!#}; command=${command#--command=}
    mkdir -p moejax/.venv/bin; cd moejax
    printf '#!/bin/bash\\nprintf "%%s\\\\n" "$@" > words\\n' > .venv/bin/python
    chmod +x .venv/bin/python; cd ..; bash -c "$command" ;;
esac"""
  text = tpu_vm.script(job("v5p:2x2x4"))
  done = call(text, tmp_path, {"gcloud": gcloud, "git": "exit 0"})
  assert done.returncode == 0, done.stderr
  calls = (tmp_path / "calls").read_text()
  found = re.findall(r"create|describe|scp|nohup|tail", calls)
  assert found == ["describe", "create", "describe", "scp", "nohup", "tail"]
  assert calls.index("found()") < calls.index("tpu-vm scp")  # Python before anything.
  assert "--accelerator-type=v5p-32 --runtime-version=v2-alpha-tpuv5" in calls
  assert "sudo mount 10.0.0.2:/share /runs" in calls
  file = tmp_path / "moejax" / "words"
  deadline = time.monotonic() + 30
  while not (file.exists() and "workdir" in file.read_text()):  # It was left behind.
    assert time.monotonic() < deadline
    time.sleep(0.05)
  assert file.read_text().splitlines()[-1] == "--workdir=/runs/it's a"
  # Again, after a fault: nothing is made twice.
  (tmp_path / "bin").rename(tmp_path / "before")
  done = call(text, tmp_path, {"gcloud": gcloud, "git": "exit 0"})
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "calls").read_text().count(" create ") == 1


@pytest.mark.parametrize(
  ("own", "package", "code", "said"),
  [
    ("python3.12", "", 0, ""),  # It is there: nothing is installed.
    ("python3", "", 2, "error: "),  # Too old, and no newer one can be had.
    ("python3", "python3.11", 0, "install"),
  ],
)
def test_a_python_that_moejax_takes_is_found_or_installed(
  tmp_path, own, package, code, said
):
  """Or one line says that there is none; python3 here is as old as that of an image."""
  place = tmp_path / "bin"
  real = f'[ "$1" = -c ] && exec {shlex.quote(sys.executable)} "$@"'
  works = f'#!/bin/bash\n{real}\necho "$0 $@" > made\n'
  old = '#!/bin/bash\n[ "$1" = --version ] && echo Python 3.10.12 || exit 1\n'
  apt = f"""#!/bin/bash
case "$*" in *update) exit 1 ;; esac
[ -n "{package}" ] && [[ "$*" = *"{package or "none"}-venv" ]] || exit 100
printf '%s' {shlex.quote(works)} > {place}/{package}; chmod +x {place}/{package}
echo installed >&2
"""
  programs = {"sudo": '#!/bin/bash\nexec "$@"\n', "apt-get": apt, "python3": old}
  programs |= {own: works} if own != "python3" else {}
  place.mkdir()
  for name, text in programs.items():
    (place / name).write_text(text)
    (place / name).chmod(0o755)
  for name in ("bash", "chmod", "hostname"):
    (place / name).symlink_to(shutil.which(name) or "/bin/true")
  done = subprocess.run(
    ["bash", "-c", tpu_vm._PYTHON],
    env={"PATH": str(place)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.returncode == code, done.stderr
  assert said in done.stderr and len(done.stderr.splitlines()) == bool(said)
  assert (tmp_path / "made").exists() == (code == 0)


@pytest.mark.parametrize(("committed", "code"), [("exit 0", 0), ("exit 128", 2)])
def test_what_a_clone_does_not_send_is_said_before_a_machine_is_made(
  tmp_path, committed, code
):
  """Files that changed since the last commit, and a config that is not in it."""
  git = f"""case "$1" in
  status) echo " M a"; echo "?? b" ;;
  cat-file) {committed} ;;
  archive) echo "$@" > archived ;;
esac"""
  text = tpu_vm.script(job("v5p:2x2x1", config_file="configs/mine.py"))
  gcloud = 'echo "$@" >> calls; case "$*" in *describe*) echo ACTIVE ;; esac'
  done = call(text, tmp_path, {"gcloud": gcloud, "git": git})
  assert done.returncode == code, done.stderr
  assert "2 changed or new file(s) are not." in done.stderr
  assert (tmp_path / "calls").exists() == (code == 0)
  assert ("--config=configs/mine.py is not committed" in done.stderr) == (code == 2)
  archive = re.findall(r"-o (\S+)", (tmp_path / "archived").read_text())[0]
  assert not pathlib.Path(archive).parent.exists() and tmp_path.exists()


def test_tpu_vms_with_a_run_in_a_bucket_mount_nothing():
  """Several machines need no shared disk then, but the extra for buckets."""
  text = tpu_vm.script(job("v5p:2x2x4", workdir="gs://bucket/first", share=""))
  assert ".[tpu,gcs]" in text and "mount" not in text and "nfs-common" not in text
  assert ".[tpu]" in tpu_vm.script(job("v5p:2x2x4"))


@pytest.mark.parametrize(
  ("machine", "name"),
  [
    ("v4:2x2x4", "v4-32"),
    ("v5p:2x2x1", "v5p-8"),
    ("v5e:4x4", "v5litepod-16"),
    ("v6e:2x4", "v6e-8"),
  ],
)
def test_types_count_chips_or_cores_as_the_cloud_does(machine, name):
  """Two cores to a chip of v4 and v5p, chips of the others."""
  assert machines.accelerator_type(topology.parse(machine)) == name


@pytest.mark.parametrize(
  "machine",
  ["v5p:2x4x4", "v4:4x4x8", "v5e:8x16", "v6e:1x1", "tpu7x:4x8x8", "h100:3x8", "cpu:64"],
)
def test_shapes_that_are_offered_pass(machine):
  machines.check_shape(topology.parse(machine))


@pytest.mark.parametrize(
  ("machine", "part"),
  [
    ("v5p:3x4x4", "slices of v5p are 2x2x1,"),
    ("v4:8x4x4", "in ascending order, such as v4:4x4x8"),
    ("v5p:4x4", "3 dimensions"),
    ("v5e:3x4", "slices of v5e are 1x1,"),
    ("v5e:64x64", "slices of v5e are 1x1,"),
    ("h100:2x9", "at most 8 GPUs (nodes x GPUs), such as h100:3x8"),
  ],
)
def test_shapes_that_nobody_offers_are_refused(machine, part):
  """Though a compiler may take them."""
  with pytest.raises(UserError) as caught:
    machines.check_shape(topology.parse(machine))
  assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("make", "machine", "fields", "part"),
  [
    (slurm.script, "v5p:2x2x1", {}, "--topology=v5p:2x2x1: give GPUs"),
    (tpu_vm.script, "h100:1x8", {}, "--topology=h100:1x8: give a TPU slice"),
    (tpu_vm.script, "tpu7x:2x2x1", {}, "offered with v4, v5e, v5p, v6e"),
    (tpu_vm.script, "v5p:2x2x1", {"slices": 2}, "--slices=2: only one slice is possible"),
    (tpu_vm.script, "v5p:2x2x1", {"zone": ""}, "--zone=ZONE is missing"),
    (tpu_vm.script, "v5p:2x2x2", {"share": ""}, "--share="),
  ],
)
def test_what_a_place_does_not_have_is_refused(make, machine, fields, part):
  """One line that names the flag."""
  with pytest.raises(UserError) as caught:
    make(job(machine, **fields))
  assert part in str(caught.value) and "\n" not in str(caught.value)
