"""Whole runs by several real processes, against the same run by one.

One run of six steps in one process is what the others are held to: four processes
that train four steps, which one process goes on from; and the one process's own fourth
step, from which two processes go on that share every sequence.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from moejax.checkpoint.manager import DIRECTORY, restore_params
from tests.experiments.test_command_lines import TINY

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = (
  *TINY,
  "train.log_every=1",
  "train.sample=false",
  "optimizer.schedule=inverse_sqrt",
)
LINES = (
  *("loss", "bits_per_byte", "balance_loss", "z_loss", "grad_norm", "learning_rate"),
  *(
    "dropped_fraction",
    "skipped_steps",
    "alarms_active",
    "alarms_raised",
    "validation_loss",
    "validation_num_tokens",
  ),
  *("validation_bits_per_byte", "validation_z_loss", "validation_dropped_fraction"),
  "validation_split_tokens",
)
"""What a line of metrics.jsonl has, besides speed, `moe` (compared apart), and what
says how the work was cut: `validation_balance_loss` is a mean over routing groups, of
which a dropless evaluation has one per device."""

UNEQUAL = (
  *("tokens_per_second", "model_flops_per_second", "validation_balance_loss"),
  "validation_exchange_lost_fraction",
)

_NOTED = """
import os, runpy, sys
index = os.environ.get("JAX_PROCESS_ID", "0")
notes = open(os.environ["NOTES"] + index, "a", buffering=1)

def note(event, args):
  if event == "open":
    path, _, flags = args
    if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
      return
    paths = [path]
  elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
    paths = [p for p in args[:2] if isinstance(p, (str, bytes, os.PathLike))]
  else:
    return
  notes.writelines(os.path.abspath(os.fsdecode(p)) + "\\n" for p in paths)

sys.addaudithook(note)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""Runs a program and notes every path that Python opens for writing, makes or removes."""


class Machine:
  """Starts the programs, in one process or in several."""

  def __init__(self, root: pathlib.Path):
    self.root = root

  def run(self, program: str, *flags: str, count: int = 1, devices: int = 1, code=0):
    """Returns standard output and error of the first process, and the others' logs."""
    logs = self.root / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    command = [sys.executable, "-c", _NOTED, program, *flags]
    if count > 1:
      launcher = [sys.executable, "-m", "tools.launch_local", f"--logs={logs}"]
      launcher += [f"--processes={count}", f"--devices_per_process={devices}", "--"]
      command = launcher + command
    for path in self.root.glob("notes_*"):
      path.unlink()
    environment = os.environ | {"NOTES": f"{self.root}/notes_"}
    done = subprocess.run(
      command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    others = [(logs / f"process_{i}.log").read_text() for i in range(1, count)]
    return done.stdout, done.stderr, others

  def train(self, name: str, steps: int, *mesh: str, **processes):
    flags = [f"--config.{s}" for s in (*SETTINGS, f"train.num_steps={steps}", *mesh)]
    cache = f"--config.data.cache_dir={self.root / 'cache'}"
    workdir = f"--workdir={self.root / name}"
    return self.run("experiments.train", workdir, cache, *flags, **processes)

  def notes(self, process: int) -> list[str]:
    return (self.root / f"notes_{process}").read_text().splitlines()

  def lines(self, name: str) -> list[dict]:
    text = (self.root / name / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
  """With the run that the others are compared with."""
  machine = Machine(tmp_path_factory.mktemp("machine"))
  machine.train("one", 6)
  return machine


@pytest.fixture(scope="module")
def four(machine):
  """Four steps by four processes of two devices: what they wrote, and their logs."""
  mesh = ("mesh.expert=4", "mesh.fsdp=2", "mesh.data=1")
  _, _, logs = machine.train("four", 4, *mesh, count=4, devices=2)
  shutil.copytree(machine.root / "four", machine.root / "four_then_one")
  return [machine.notes(index) for index in range(4)], logs


def ours(log: str) -> list[str]:
  """The lines that do not come from XLA or gloo."""
  # Not from their beginning: gloo's threads write into each other's lines, and two ends
  # of lines may follow each other.
  theirs = re.compile(r"peer ranks|\[Gloo\]|\w\.cc:\d+\]")
  return [line for line in log.splitlines() if line and not theirs.search(line)]


def assert_same_lines(have: list[dict], want: list[dict]) -> None:
  """Metrics of the whole batch: sums to rounding, counts and loads exactly."""
  assert [line["step"] for line in have] == [line["step"] for line in want]
  for a, b in zip(have, want, strict=True):
    assert (a.keys() | b.keys()) - set(LINES) <= {"step", "moe", "alarms", *UNEQUAL}
    for name in LINES:
      assert (name in a) == (name in b)
      if name in a:
        tolerance = 1e-5 if "loss" in name else 1e-4
        assert a[name] == pytest.approx(b[name], rel=tolerance), name
    assert a["dropped_fraction"] == b["dropped_fraction"]
    assert a.get("alarms") == b.get("alarms")
    assert a["moe"].keys() == b["moe"].keys()
    for name in ("load", "drop_fraction", "dropped_tokens", "max_load_ratio"):
      assert a["moe"][name] == b["moe"][name]


def assert_same_parameters(a: pathlib.Path, b: pathlib.Path, step: int) -> None:
  """Close, as sums in another order are; both verified by their fingerprints."""
  first, second = (restore_params(path, step)[0] for path in (a, b))
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5)


def test_four_processes_train_as_one(machine, four):
  """Eight devices, experts and parameters cut over processes: losses, loads, drops."""
  del four
  assert_same_lines(machine.lines("four"), machine.lines("one")[:4])
  assert_same_parameters(machine.root / "four", machine.root / "one", step=4)


def test_all_write_the_checkpoint_and_only_the_first_writes_the_rest(machine, four):
  """No other process so much as opens a file of the run for writing, or prints."""
  notes, logs = four
  workdir = str(machine.root / "four")
  mine = [{p for p in paths if p.startswith(f"{workdir}/")} for paths in notes]
  checkpoints = f"{workdir}/{DIRECTORY}"
  for name in ("metrics.jsonl", "tensorboard", "eval.json", "report.png", "config.json"):
    assert any(name in path for path in mine[0])
  for paths, log in zip(mine[1:], logs, strict=True):
    assert not [p for p in paths if not p.startswith(checkpoints)]
    assert ours(log) == []
  for step in (2, 4):
    for index in range(4):
      part = (
        machine.root / "four" / DIRECTORY / str(step) / "state" / f"ocdbt.process_{index}"
      )
      assert sum(f.stat().st_size for f in part.rglob("*") if f.is_file()) > 10_000
  assert len(list((machine.root / "four" / "tensorboard").iterdir())) == 1


def test_one_process_goes_on_where_four_stopped(machine, four):
  """From their checkpoint to the end, with the losses of the run never moved."""
  del four
  machine.train("four_then_one", 6)
  assert_same_lines(machine.lines("four_then_one"), machine.lines("one"))
  assert_same_parameters(machine.root / "four_then_one", machine.root / "one", step=6)


def test_two_processes_that_share_sequences_go_on_where_one_stopped(machine):
  """`tensor` spans the processes, so both must read the same sequences."""
  shutil.copytree(machine.root / "one", machine.root / "two")
  for name in (f"{DIRECTORY}/6", "tensorboard"):
    shutil.rmtree(machine.root / "two" / name)
  (machine.root / "two" / "eval.json").unlink()
  machine.train("two", 6, "mesh.tensor=2", "mesh.data=1", count=2)
  assert_same_lines(machine.lines("two"), machine.lines("one"))
  assert_same_parameters(machine.root / "two", machine.root / "one", step=6)
  # Once more, with nothing left to do: the other process writes no picture either.
  out, _, _ = machine.train("two", 6, "mesh.tensor=2", "mesh.data=1", count=2)
  assert "Already done" in out
  written = [p for p in machine.notes(1) if p.startswith(str(machine.root / "two" / "r"))]
  assert not written


def test_alarms_are_those_of_one_process(machine):
  """A router with logits of hundreds and loads below their bound: each process sees half
  of the tokens, and the same alarms begin at the same steps, with the same numbers."""
  ill = ("moe.router_init_scale=100", "alarms.patience=1", "alarms.max_load=0.99")
  quick = ("train.eval_every=0", "train.checkpoint_every=0", "train.sample=false")
  settings = (*ill, *quick, "train.report=false", "train.final_eval_tokens=100")
  machine.train("ill", 4, *settings)
  out, _, logs = machine.train("ill_two", 4, *settings, "mesh.data=2", count=2)
  one, two = machine.lines("ill"), machine.lines("ill_two")
  assert [line["step"] for line in two] == [1, 2, 3, 4]
  for a, b in zip(one, two, strict=True):
    for name in ("alarms", "alarms_active", "alarms_raised"):
      assert a.get(name) == b.get(name), name
    for name in ("top_gate", "top_logit", "router_gradient"):
      np.testing.assert_allclose(b["moe"][name], a["moe"][name], rtol=1e-4, err_msg=name)
  assert "max_logit" in one[-1]["alarms"] and "max_load" not in one[-1]["alarms"]
  # Told by the first process alone.
  assert "--config.alarms.max_logit" in out and ours(logs[0]) == []


def test_two_processes_are_profiled_by_the_first(machine):
  """Half the experts in each: the table is of the first one's device, with what it sends,
  and the other process writes and prints nothing."""
  run, out = machine.root / "one", machine.root / "profiled"
  flags = (f"--workdir={run}", f"--out={out}", "--steps=2")
  mesh = [f"--config.mesh.{axis}" for axis in ("data=1", "expert=2", "fsdp=1")]
  printed, _, logs = machine.run("experiments.profile", *flags, *mesh, count=2)
  found = json.loads((out / "profile.json").read_text())
  [device] = found["devices"]
  names = {part["name"] for part in device["parts"]}
  assert {"attention", "experts", "exchange", "optimizer"} <= names
  assert device["collectives"] > 0 and device["unattributed_share"] <= 0.1
  assert device["busy"] + device["waiting"] == pytest.approx(found["step_ms"], rel=1e-6)
  assert "device 0" in printed and "attention" in printed
  assert ours(logs[0]) == []
  assert not [path for path in machine.notes(1) if path.startswith(str(out))]


def test_processes_evaluate_together(machine, four):
  """Loss, drops, loads, domains and routing of one process; one prints and writes."""
  del four
  flags = (
    f"--workdir={machine.root / 'four'}",
    "--split=test",
    "--eval_capacity_factor=0.5,dropless",
    "--routing",
  )
  results = []
  for count in (1, 2):
    output = machine.root / f"by_{count}"
    output.mkdir()
    out, _, logs = machine.run(
      "experiments.evaluate", *flags, f"--output={output}", count=count, devices=2
    )
    assert str(output / "eval_4_test_capacity_0.5_dropless.json") in out
    names = ("eval_4_test_capacity_0.5_dropless", "routing_4_test")
    results.append([json.loads((output / f"{n}.json").read_text()) for n in names])
  assert ours(logs[0]) == []
  assert not [p for p in machine.notes(1) if p.startswith(str(machine.root / "by_2"))]
  (one, routing), (two, routing_of_two) = results
  assert routing == routing_of_two
  assert (one["tokens"], one["bytes"]) == (two["tokens"], two["bytes"])
  for a, b in zip(one["results"], two["results"], strict=True):
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert a["dropped_fraction"] == b["dropped_fraction"]
    assert [layer["load"] for layer in a["layers"]] == [
      layer["load"] for layer in b["layers"]
    ]
    for name, domain in a["domains"].items():
      assert domain["tokens"] == b["domains"][name]["tokens"]
      assert domain["loss"] == pytest.approx(b["domains"][name]["loss"], rel=1e-6)


def test_generation_is_refused_to_several_processes(machine):
  """Exit code 2 and one line, on the first process too."""
  flags = (f"--workdir={machine.root / 'one'}", "--prompt=x")
  out, error, _ = machine.run("experiments.generate", *flags, count=2, code=2)
  assert "one process, and this is one of 2" in error and not out.strip()
