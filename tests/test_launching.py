"""The recipes of docs/launching.md: their flags are moejax's, and fit their devices."""

import pathlib
import re
import subprocess

import pytest
import yaml

from moejax.cli import flags as cli
from moejax.config import devices as config_devices
from moejax.config import text as config_text
from moejax.config.check import validate

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PROGRAM_FLAGS = {
  "config",
  "workdir",
  "coordinator_address",
  "num_processes",
  "process_id",
}


def config_of(words: list[str]):
  """The config of a command line, checked as the program checks it."""
  config = cli.load_config("default")
  for word in words:
    name, _, value = word.removeprefix("--").partition("=")
    if name.startswith("config."):
      dotted = name.removeprefix("config.")
      config_text.set_field(config, dotted, config_text.parse_value(dotted, value))
    else:
      assert name in PROGRAM_FLAGS, word
  validate(config)
  return config


def flags_in(text: str) -> list[str]:
  return re.findall(r"--[a-z_.]+=[^\s\"']+", text)


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_jobset_asks_for_the_devices_its_mesh_needs(kind):
  """As many pods as completions, and a mesh that all their devices make.

  Where places are given by hand: as many processes as pods, at the address of the first.
  """
  jobset = yaml.safe_load((DOCS / "launching" / f"jobset-{kind}.yaml").read_text())
  name, [job] = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  [container] = spec["template"]["spec"]["containers"]
  assert spec["parallelism"] == spec["completions"] and spec["backoffLimit"] == 0
  [number] = container["resources"]["limits"].values()
  devices = job["replicas"] * spec["completions"] * number
  config = config_of(container["command"][3:])
  config_devices.validate_devices(config, devices)
  env = {e["name"]: e.get("value") for e in container.get("env", ())}
  if kind == "gpu":
    assert env["JAX_NUM_PROCESSES"] == str(spec["completions"])
    address = f"{name}-{job['name']}-0-0.{name}:"
    assert env["JAX_COORDINATOR_ADDRESS"].startswith(address)
    assert "JAX_PROCESS_ID" in env
  # What starting again cannot mend ends the set.
  [rule] = spec["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [1, 2, 4]
  assert rule["onExitCodes"]["containerName"] == container["name"]


def test_the_slurm_script_is_one_and_its_mesh_fits():
  """Sound shell, and a mesh that all tasks' GPUs make, one a task."""
  path = DOCS / "launching" / "slurm.sbatch"
  subprocess.run(["bash", "-n", path], check=True)
  text = path.read_text()
  asked = dict(re.findall(r"#SBATCH --([a-z-]+)=(\S+)", text))
  assert asked["ntasks-per-node"] == asked["gpus-per-node"]
  command = text[text.index("experiments.train") :].split("\ncode=")[0]
  config = config_of([w.replace('"', "") for w in flags_in(command)])
  devices = int(asked["nodes"]) * int(asked["gpus-per-node"])
  config_devices.validate_devices(config, devices)


def test_every_command_of_the_page_has_flags_that_exist():
  """Each command line that calls the training program."""
  text = (DOCS / "launching.md").read_text()
  blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
  commands = [
    part.split("\ngcloud")[0]
    for block in blocks
    for part in block.split("experiments.train")[1:]
    if "--config=" in part
  ]
  assert len(commands) == 5
  for command in commands:
    config_of(flags_in(command))


def test_files_that_the_page_names_are_there():
  """Links into the repository."""
  text = (DOCS / "launching.md").read_text()
  for link in re.findall(r"\]\((launching/[^)]+)\)", text):
    assert (DOCS / link).is_file(), link
