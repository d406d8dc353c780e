"""The three programs as a user calls them: real processes on a run they left."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

CORPUS = pathlib.Path(__file__).parents[1] / "data" / "corpus"
TINY = (
  "data.name=text",
  f"data.path={CORPUS}",
  "data.tokenizer=bytes",
  "data.sequence_length=32",
  "model.num_layers=2",
  "model.width=32",
  "model.num_heads=2",
  "model.hidden=64",
  "moe.num_experts=4",
  "moe.hidden=64",
  "moe.group_size=0",
  "train.num_steps=4",
  "train.batch_size=8",
  "train.eval_every=2",
  "train.checkpoint_every=2",
)
QUICK = (*TINY, "train.sample=false", "train.report=false")
"""For tests that look at neither the sample nor report.png."""


def call(program: str, *args: str, code: int = 0) -> str:
  """What it prints: standard output of a success, standard error of a refusal."""
  command = [sys.executable, "-m", program, *args]
  done = subprocess.run(command, capture_output=True, text=True, timeout=600)
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> str:
  """A finished run of four steps, by a relative path: what a user types."""
  directory = tmp_path_factory.mktemp("run")
  cache = tmp_path_factory.mktemp("cache")
  call(
    "experiments.train",
    f"--workdir={directory}",
    f"--config.data.cache_dir={cache}",
    *(f"--config.{setting}" for setting in TINY),
  )
  return os.path.relpath(directory)


def test_evaluate_needs_only_the_directory(workdir):
  """Every factor asked for is on screen and in the file named by what was asked."""
  printed = call(
    "experiments.evaluate",
    f"--workdir={workdir}",
    "--split=test",
    "--eval_capacity_factor=0.5,dropless",
    "--routing",
  )
  file = pathlib.Path(workdir) / "eval_4_test_capacity_0.5_dropless.json"
  assert str(file) in printed
  result = json.loads(file.read_text())
  by_factor = {r["eval_capacity_factor"]: r for r in result["results"]}
  assert by_factor[0.5]["dropped_fraction"] > 0.2
  assert by_factor["dropless"]["dropped_fraction"] == 0
  for factor, values in by_factor.items():
    assert str(factor) in printed and f"{values['loss']:.4f}" in printed
    domains = values["domains"].values()
    total = sum(d["loss"] * d["tokens"] for d in domains)
    assert total / values["tokens"] == pytest.approx(values["loss"], rel=1e-9)
  assert (pathlib.Path(workdir) / "routing_4_test.png").exists()


@pytest.mark.parametrize(
  "override", ["train.batch_size=4", "moe.expert_dropout=0.5", "moe.capacity_factor=2"]
)
def test_evaluate_refuses_an_override_that_changes_nothing(workdir, override):
  """At once: another number would be expected, and the same would come out."""
  error = call(
    "experiments.evaluate", f"--workdir={workdir}", f"--config.{override}", code=2
  )
  assert error.startswith(f"error: --config.{override.partition('=')[0]}: only training")
  assert error.count("\n") == 1


def test_no_evaluation_replaces_the_runs_own_or_another(workdir):
  """Each setting has a file of its own, and eval.json is what the run wrote, to the byte.

  The same step, an earlier one, a part of the split under another capacity, other
  sequences; and another capacity of the first at the same time.
  """
  folder = pathlib.Path(workdir)
  own = (folder / "eval.json").read_bytes()
  for file in folder.glob("eval_*.json"):
    file.unlink()
  command = [sys.executable, "-m", "experiments.evaluate", f"--workdir={workdir}"]
  beside = subprocess.Popen([*command, "--eval_capacity_factor=dropless,2"])
  for flags in (
    [],
    ["--step=2"],
    ["--max_batches=1", "--eval_capacity_factor=0.25"],
    ["--config.data.sequence_length=16"],
  ):
    call("experiments.evaluate", f"--workdir={workdir}", *flags)
  assert beside.wait(timeout=300) == 0
  assert (folder / "eval.json").read_bytes() == own

  found = {p.stem: json.loads(p.read_text()) for p in folder.glob("eval_*.json")}
  newest, earlier = found.pop("eval_4_validation"), found.pop("eval_2_validation")
  assert newest["loss"] == pytest.approx(json.loads(own)["loss"], rel=1e-6)
  dropless, trained = newest["results"]
  assert dropless["loss"] == newest["loss"]
  assert trained["eval_capacity_factor"] == 1.25 and trained["dropped_fraction"] > 0
  assert earlier["loss"] != newest["loss"] and earlier["tokens"] == newest["tokens"]
  part = found.pop("eval_4_validation_capacity_0.25_first_256")
  assert part["tokens"] == 8 * 32 < part["split_tokens"] == newest["tokens"]
  assert len(found.pop("eval_4_validation_capacity_dropless_2")["results"]) == 2
  [(name, shorter)] = found.items()
  assert shorter["changed"] == {"data.sequence_length": 16}
  assert name.startswith("eval_4_validation_")


def test_a_contradiction_of_the_runs_own_evaluation_is_said(workdir, tmp_path):
  """Another loss for the same text, as from another machine: both named, none lost."""
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  own = json.loads((copy / "eval.json").read_text())
  own["results"][0]["loss"] = own["loss"] = 1.25
  (copy / "eval.json").write_text(json.dumps(own))
  printed = call("experiments.evaluate", f"--workdir={copy}")
  assert "eval.json has 1.2500 nats/token for the same step" in printed
  assert json.loads((copy / "eval.json").read_text()) == own


def test_inspect_ends_with_one_line_for_the_whole_state(workdir):
  """`sha256 <hex>`, the same twice, another one for another step."""
  command = ("tools.inspect_checkpoint", f"--workdir={workdir}")
  lines = [call(*command, *more).splitlines()[-1] for more in ((), (), ("--step=2",))]
  assert all(re.fullmatch("sha256 [0-9a-f]{64}", line) for line in lines)
  assert lines[0] == lines[1] != lines[2]


def test_generate_continues_the_prompt(workdir):
  """The same seed gives the same samples, each of which begins with the prompt."""
  args = (f"--workdir={workdir}", "--prompt=def f(", "--max_tokens=8", "--num_samples=2")
  first, second = (call("experiments.generate", *args) for _ in range(2))
  samples = first.split("--- step 4")[0]
  assert samples == second.split("--- step 4")[0]
  assert samples.count("def f(") == 2 and "tokens/s" in first


@pytest.mark.parametrize(
  ("program", "args", "names"),
  [
    ("evaluate", ["--step=3"], ["--step=3", "2, 4"]),
    ("evaluate", ["--eval_capacity_factor=0"], ["--eval_capacity_factor=0"]),
    ("evaluate", ["--config.model.width=64"], ["--config.model", "checkpoint"]),
    ("evaluate", ["--max_batches=-1"], ["--max_batches", "-1"]),
    ("evaluate", ["--batch_size=0"], ["--batch_size", "0"]),
    ("generate", ["--prompt=" + "x" * 40], ["--prompt", "32"]),
    ("generate", ["--temprature=1"], ["--temprature", "temperature"]),
    ("generate", ["--temperature=-1"], ["--temperature=-1"]),
    ("generate", ["--num_samples=0"], ["--num_samples=0", "[1, 65536]"]),
    ("generate", ["--seed=-1"], ["--seed=-1"]),
    ("generate", ["--step=3"], ["--step=3", "2, 4"]),
  ],
)
def test_mistakes_are_refused_by_name(workdir, program, args, names):
  """Exit code 2, and one message that has the flag, the value and what to do."""
  error = call(f"experiments.{program}", f"--workdir={workdir}", *args, code=2)
  assert "Traceback" not in error
  for name in names:
    assert name in error


@pytest.mark.parametrize(
  ("program", "args", "name"),
  [
    ("generate", ["--prompt=" + "x" * 40], "--prompt"),
    ("generate", ["--prompt=\udcff"], "UTF-8"),
    ("generate", ["--num_samples=0"], "--num_samples=0"),
    ("evaluate", ["--config.data.test_fraction=0", "--split=test"], "--split=test"),
  ],
)
def test_mistakes_are_found_before_parameters_are_read(
  workdir, tmp_path, program, args, name
):
  """In a directory whose parameters are gone: those of a large run take minutes."""
  shutil.copytree(workdir, tmp_path / "run")
  for state in (tmp_path / "run" / "checkpoints").glob("*/state"):
    shutil.rmtree(state)
  error = call(f"experiments.{program}", f"--workdir={tmp_path / 'run'}", *args, code=2)
  assert name in error and "Traceback" not in error and "damaged" not in error


@pytest.mark.parametrize("program", ["evaluate", "generate"])
def test_a_directory_without_a_run_is_refused(program, tmp_path):
  """It is named, and nothing is written there."""
  error = call(f"experiments.{program}", f"--workdir={tmp_path}", code=2)
  assert str(tmp_path) in error and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_warm_start_ends_as_a_cold_one(tmp_path, monkeypatch):
  """Loaded programs and compiled ones give the same parameters and moments, bit for bit.

  The second run has every program from the first one's cache: nothing is added to it.
  """
  # By default only what compiles for a second is kept, which may differ between starts.
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  digests, entries = [], []
  for name, cache in (("none", "none"), ("cold", "xla"), ("warm", "xla")):
    folder = tmp_path / name
    printed = call(
      "experiments.train",
      f"--workdir={folder}",
      f"--config.data.cache_dir={tmp_path / 'data'}",
      f"--compilation_cache={cache if cache == 'none' else tmp_path / cache}",
      *(f"--config.{setting}" for setting in QUICK),
    )
    first = printed.splitlines()[0]
    assert first.startswith(
      f"Training configs/default.py in {folder} with data.cache_dir="
    )
    assert re.search("compiling the train step: [0-9.]+ s", printed)
    shown = call("tools.inspect_checkpoint", f"--workdir={folder}")
    digests.append(shown.splitlines()[-1])
    entries.append({p.name for p in (tmp_path / "xla").rglob("*-cache")})
  assert digests[0] == digests[1] == digests[2]
  assert not entries[0] and any(n.startswith("jit_step") for n in entries[1])
  assert entries[1] == entries[2]


@pytest.mark.parametrize(
  ("program", "args", "names"),
  [
    ("evaluate", ["--batch_size=0"], ["--batch_size=0"]),
    ("evaluate", ["--max_batches=-1"], ["--max_batches=-1"]),
    ("evaluate", ["--step=-1"], ["--step=-1"]),
    ("generate", ["--num_samples=0"], ["--num_samples=0"]),
    ("generate", ["--top_p=2"], ["--top_p=2"]),
    (
      "generate",
      ["--workdir=no_such"],
      ["--workdir=no_such does not exist", "was given"],
    ),
    (
      "evaluate",
      ["--workdir=no_such"],
      ["--workdir=no_such does not exist", "was given"],
    ),
    ("train", ["--join_timeout=1e300"], ["--join_timeout=1e300"]),
    ("train", ["--process_id=-1"], ["--process_id=-1"]),
  ],
)
def test_bad_numbers_are_refused_before_jax_is_imported(program, args, names):
  """One line that has the flag and its value, exit code 2."""
  error = call(f"experiments.{program}", *args, code=2)
  assert error.count("\n") == 1 and error.startswith("error: ")
  for name in names:
    assert name in error
