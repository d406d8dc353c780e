"""The command `launch`: what is printed is checked, and nothing is sent by itself."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

import pytest
import yaml
from absl import flags

from moejax.cli import arguments, launch
from moejax.cli import flags as cli
from moejax.config import devices as config_devices
from moejax.config import text as config_text
from moejax.config.check import validate
from moejax.deploy import targets
from moejax.deploy.targets import TARGETS
from moejax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
TPU = ("--target=gke-tpu", "--topology=v5p:2x2x4", "--image=IMAGE", "--workdir=/runs/a")
FITS = ("--config.train.batch_size=128", "--config.moe.group_size=0")


def call(*words: str, path: str = "", **options) -> subprocess.CompletedProcess[str]:
  env = os.environ | {"PATH": path or os.environ["PATH"]}
  return subprocess.run(
    [sys.executable, "-m", *words], env=env, capture_output=True, text=True, cwd=ROOT
  )


def rendered() -> dict[str, list[str]]:
  """The commands of docs/launching.md that write a file of docs/launching."""
  text = (ROOT / "docs" / "launching.md").read_text().replace("\\\n", " ")
  lines = [line for line in text.splitlines() if "tools.launch " in line]
  commands = [shlex.split(line) for line in lines]
  return {
    word.removeprefix("--output="): command
    for command in commands
    for word in command
    if word.startswith("--output=docs/")
  }


@pytest.mark.parametrize("file", ["jobset-tpu.yaml", "jobset-gpu.yaml", "slurm.sbatch"])
def test_the_files_in_docs_are_what_the_page_says_renders_them(file):
  """And the command in them has a config that its devices can run."""
  [command] = [c for name, c in rendered().items() if name.endswith(f"/{file}")]
  words = [w for w in command[2:] if not w.startswith("--output=")]
  done = call(*words)
  assert done.returncode == 0, done.stderr
  assert done.stdout == (ROOT / "docs" / "launching" / file).read_text()
  assert "Nothing was submitted" in done.stderr
  config = cli.load_config("default")
  for setting in re.findall(r"--config\.([\w.]+=[^\s'\"]+)", done.stdout):
    name, _, value = setting.partition("=")
    config_text.set_field(config, name, config_text.parse_value(name, value))
  validate(config)
  config_devices.validate_devices(config, 16)


def test_a_given_cache_and_name_win(tmp_path):
  """Over those that are filled in; --output writes the same text as is printed."""
  given = ("--config.data.cache_dir=/mine", "--name=other", "--join_timeout=60")
  done = call("tools.launch", *TPU, *FITS, *given, f"--output={tmp_path / 'a.yaml'}")
  assert (done.returncode, done.stdout) == (0, ""), done.stderr
  jobset = yaml.safe_load((tmp_path / "a.yaml").read_text())
  assert jobset["metadata"]["name"] == "other"
  text = str(jobset)
  assert "--config.data.cache_dir=/mine" in text and text.count("cache_dir") == 1
  assert "--join_timeout=60.0" in text
  assert "16 devices as data 16" in done.stderr


def test_only_submit_calls_the_program_that_starts_jobs(tmp_path):
  """It gets the text, and its exit code is the command's."""
  (tmp_path / "kubectl").write_text(f"#!/bin/bash\ncat > {tmp_path}/got; exit 3\n")
  (tmp_path / "kubectl").chmod(0o755)
  path = f"{tmp_path}:{os.environ['PATH']}"
  shown = call("tools.launch", *TPU, *FITS, path=path)
  assert shown.returncode == 0 and not (tmp_path / "got").exists()
  done = call("tools.launch", *TPU, *FITS, "--submit", path=path)
  assert done.returncode == 3
  assert (tmp_path / "got").read_text() == shown.stdout


def test_submitting_a_script_needs_the_programs_that_it_calls(tmp_path, monkeypatch):
  """Bash is everywhere; without gcloud it would stop half way."""
  (tmp_path / "bash").write_text("#!/bin/sh\nexit 0\n")
  (tmp_path / "bash").chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(UserError, match="gcloud is not on the PATH"):
    targets.submit("tpu-vm", "exit 0")


@pytest.mark.parametrize(
  ("words", "part"),
  [
    ((*TPU, "--config.train.batch_size=12"), "12 sequences, which 16 devices"),
    ((*TPU, *FITS, "--name=A_b"), "--name=A_b: at most 40 lower-case letters"),
    ((*TPU, *FITS, "--slurm.time=3"), "--slurm.time is only read with --target=slurm"),
    ((*TPU[:3],), "--workdir=DIR is missing"),
    (("--workdir=/a/b",), "--target is missing"),
    (("--target=slurm", "--workdir=/a/b"), "--topology is missing"),
    (("--target=slurm", TPU[1], TPU[3]), "give GPUs"),
    (
      ("--target=slurm", "--topology=cpu:2", "--workdir=a", "--slurm.nodes=2"),
      "--slurm.nodes is not read here: it comes from --topology",
    ),
    (
      (*TPU, "--config=mixtral_8x7b", "--config.mesh.fsdp=2", "--config.mesh.data=1")
      + ("--config.mesh.expert=8",),
      "a device needs at least",
    ),
    ((*TPU, *FITS, "--submit"), "kubectl is not on the PATH"),
    (
      (*TPU, *FITS, "--zone=here"),
      "--zone is not read with --target=gke-tpu, only with tpu-vm",
    ),
    ((*TPU, *FITS, "--join_timeout=x"), "join_timeout"),
    ((*TPU, *FITS, "--emergency_every=5"), "needs --emergency_local_dir=DIR"),
  ],
)
def test_a_mistake_is_one_line_and_prints_no_manifest(tmp_path, words, part):
  """Exit code 2, before anything is compiled or sent."""
  done = call("tools.launch", *words, path=str(tmp_path))
  assert (done.returncode, done.stdout) == (2, ""), done.stderr
  error = done.stderr.splitlines()[-1]
  assert error.startswith("error: ") and part in error


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_target_does_not_read_is_refused(target):
  """Each flag that is given, even with its default; the others are taken."""
  given = flags.FlagValues()
  for name in ("target", "slurm.setup", *launch._READ_BY):
    flags.DEFINE_string(name, None, "", flag_values=given)
  for name, readers in launch._READ_BY.items():
    given(["launch", f"--target={target}", f"--{name}=1"])
    if target in readers:
      launch._refuse_unread(given)
    else:
      with pytest.raises(UserError, match=f"--{name} is not read with --target={target}"):
        launch._refuse_unread(given)
    given.unparse_flags()


@pytest.mark.parametrize(
  ("output", "part"), [("", "is a directory"), ("no/a.sh", "does not exist")]
)
def test_a_file_that_cannot_be_written_is_refused_first(tmp_path, output, part):
  """One line, and nothing is made."""
  with pytest.raises(UserError, match=part) as caught:
    arguments.writable_file(tmp_path / output, "--output")
  assert str(caught.value).startswith("--output=") and not any(tmp_path.iterdir())


def test_help_lists_the_flags_of_the_program():
  """Its own, with their texts, and those of Slurm."""
  said = call("moejax.cli.main", "launch", "--help").stdout
  names = set(re.findall(r"^  --([\w.]+): \S", said, re.MULTILINE))
  assert {"target", "topology", "share", "submit", "output", "slurm.time"} <= names
  assert {*launch._READ_BY} <= names


def test_runs_of_one_config_have_jobs_of_different_names(monkeypatch):
  """A second job of the same name would replace the first; the same run keeps its."""
  monkeypatch.setattr(launch.flags, "FLAGS", types.SimpleNamespace(target="tpu-vm"))
  first, second = (launch._name("default", f"/runs/{name}") for name in "ab")
  assert first != second and first == launch._name("default", "/runs/a")


def test_the_mesh_that_is_recommended_uses_all_devices():
  """The remedy is not one under which some of the machine stays idle."""
  error = call("tools.launch", *TPU, "--config.train.batch_size=12").stderr
  flags = re.findall(r"--config\.[a-z_.]+=\S+", error.rpartition("Use ")[2])
  done = call("tools.launch", *TPU, *(flag.rstrip(".,") for flag in flags))
  assert done.returncode == 0, error + done.stderr


def test_a_sweep_prints_one_manifest_for_each_run(tmp_path):
  """With names of their own, and the commands that start the runs."""
  sweep = ("experiments.sweep", f"--workdir={tmp_path}", "--executor=print", *FITS)
  machine = ("--target=gke-tpu", "--topology=v5p:2x2x4", "--image=IMAGE")
  done = call(*sweep, *machine, "--sweep.moe.num_experts=8,16", "--name=ec")
  assert done.returncode == 0, done.stderr
  jobsets = [made for made in yaml.safe_load_all(done.stdout) if made]
  names = [made["metadata"]["name"] for made in jobsets]
  assert len(set(names)) == 2 and all(name.startswith("ec-") for name in names)
  runs = {run.name.rpartition("-")[2]: run for run in (tmp_path / "runs").iterdir()}
  for made in jobsets:
    run = runs.pop(made["metadata"]["name"].removeprefix("ec-"))
    assert f"--workdir={run}'" in str(made) and sys.executable not in str(made)
  assert not runs
  wrong = call(*sweep, *machine, "--sweep.moe.num_experts=8,9")
  assert (wrong.returncode, wrong.stdout) == (2, "")


def test_a_sweep_for_tpu_vms_needs_the_disk_with_its_configs(tmp_path):
  """Even for one machine: each run reads what the sweep has written here."""
  sweep = ("experiments.sweep", f"--workdir={tmp_path / 'a'}", "--executor=print", *FITS)
  machine = ("--target=tpu-vm", "--topology=v5p:2x2x1", "--zone=z")
  done = call(*sweep, *machine, "--sweep.moe.num_experts=8,16")
  assert (done.returncode, done.stdout) == (2, "") and "--share=" in done.stderr
  assert not list(tmp_path.rglob("*.sh"))
