"""Options of a sweep on Slurm, and the batch script that they make."""

import os
import subprocess

import pytest
from absl import flags

from moejax.cli import flags as cli
from moejax.errors import UserError
from moejax.sweep.execution import (
  slurm,
  slurm_options,
)
from moejax.sweep.execution.slurm_options import SlurmOptions
from tests.sweep.execution.slurm_answers import NAME


@pytest.mark.parametrize(
  ("text", "minutes"),
  [
    ("90", 90),
    ("1:30", 2),
    ("1:30:00", 90),
    ("0:00:01", 1),
    ("2-0", 2880),
    ("1-12:30", 2190),
    ("1-00:00:01", 1441),
  ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text, minutes):
  """The formats of sbatch's manual; what is left of a minute counts as one."""
  assert slurm_options.minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "1h", "1:2:3:4", "1-", "-5", "unlimited"])
def test_other_time_limits_are_refused_by_name(text):
  with pytest.raises(UserError, match=f"--slurm.time={text}: expected"):
    slurm_options.minutes(text)


def test_runs_are_told_two_minutes_before_the_limit_or_a_third_of_it():
  assert SlurmOptions(time="60").warning_seconds == 120
  assert SlurmOptions(time="3").warning_seconds == 60
  assert SlurmOptions(time="60", signal_seconds=30).warning_seconds == 30


@pytest.mark.parametrize(
  ("given", "named"),
  [
    ({"nodes": 0}, "--slurm.nodes=0"),
    ({"tasks_per_node": -1}, "--slurm.tasks_per_node=-1"),
    ({"cpus_per_task": 0}, "--slurm.cpus_per_task=0"),
    ({"gpus_per_node": -1}, "--slurm.gpus_per_node=-1"),
    ({"array_parallelism": 0}, "--slurm.array_parallelism=0"),
    ({"mem": "4 GB"}, "--slurm.mem=4 GB"),
    ({"account": "my account"}, "--slurm.account='my account'"),
    ({"time": "1", "signal_seconds": 60}, "--slurm.signal_seconds=60"),
    ({"setup": ("a\nb",)}, "--slurm.setup"),
  ],
)
def test_values_that_no_slurm_takes_are_refused_by_name(given, named):
  with pytest.raises(UserError) as error:
    slurm_options.checked(SlurmOptions(**given))
  assert str(error.value).startswith(named)


@pytest.fixture
def defined_flags():
  """The flags, only while a test runs: other programs in this process have others."""
  before = set(flags.FLAGS)
  slurm_options.define_flags()
  yield
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)


def test_flags_give_the_options_and_a_misspelt_one_names_the_nearest(defined_flags):
  words = [
    "--slurm.time=2-0",
    "--slurm.gpus_per_node=8",
    "--slurm.setup=a",
    "--noslurm.wait",
  ]
  cli.parse(["sweep", *words, "--slurm.setup=b c"])
  found = slurm_options.from_flags()
  assert found == SlurmOptions(
    time="2-0", gpus_per_node=8, setup=("a", "b c"), wait=False
  )
  assert set(slurm_options.given()) == {
    "slurm.time",
    "slurm.gpus_per_node",
    "slurm.setup",
    "slurm.wait",
  }
  with pytest.raises(UserError, match="Did you mean --slurm.partition?"):
    cli.parse(["sweep", "--slurm.partion=a"])


# ------------------------------------------------------------------- the batch script


def script(tmp_path, **given) -> str:
  """The batch script of an array of two, as submitit writes it."""
  from submitit.slurm import slurm as submitit_slurm

  words = slurm.parameters(NAME, SlurmOptions(**given))
  return submitit_slurm._make_sbatch_string(
    command="THE_TASK", folder=tmp_path, map_count=2, **words
  )


def test_the_batch_script_asks_for_what_was_given(tmp_path):
  text = script(
    tmp_path,
    partition="gpu",
    time="2:00:00",
    nodes=2,
    tasks_per_node=4,
    gpus_per_node=4,
    cpus_per_task=8,
    mem="64G",
    array_parallelism=1,
    account="us",
    qos="low",
    constraint="a100",
    setup=("module load cuda",),
  )
  directives = {
    line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SB")
  }
  assert directives >= {
    "--partition=gpu",
    "--time=120",
    "--nodes=2",
    "--ntasks-per-node=4",
    "--gpus-per-node=4",
    "--cpus-per-task=8",
    "--mem=64G",
    "--array=0-1%1",
    "--account=us",
    "--qos=low",
    "--constraint=a100",
    "--signal=USR2@120",
    "--requeue",
    "--open-mode=append",
    f"--job-name={NAME}",
  }
  assert not any(line.startswith("--wckey") for line in directives)
  (srun,) = (line for line in text.splitlines() if line.startswith("srun "))
  assert srun.endswith("--kill-on-bad-exit=0 --cpus-per-task=8 --gpu-bind=none THE_TASK")
  assert text.index("module load cuda") < text.index("srun ")


def test_what_is_not_given_is_left_to_slurm(tmp_path):
  text = script(tmp_path)
  for word in ("partition", "account", "qos", "constraint", "mem", "gpu", "cpus"):
    assert f"--{word}" not in text


def test_each_job_makes_a_secret_of_its_own_that_no_file_holds(tmp_path):
  """The setup lines, run twice by a shell that has a secret's file from outside."""
  lines = slurm.parameters(NAME, SlurmOptions())["setup"]
  show = 'echo "$MOEJAX_JOB_SECRET/$MOEJAX_JOB_SECRET_FILE"'
  made = [
    subprocess.run(
      ["bash", "-ec", "\n".join([*lines, show])],
      env=os.environ | {"MOEJAX_JOB_SECRET_FILE": "x"},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for _ in range(2)
  ]
  assert made[0] != made[1]
  assert all(len(text.strip().removesuffix("/")) == 64 for text in made)
