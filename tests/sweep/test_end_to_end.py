"""One command trains three runs of a router of one's own, and ends in a report."""

import csv
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("altair", reason="needs the extra report")

ROOT = pathlib.Path(__file__).parents[2]
ROUTER = ROOT / "examples/my_router.py"

SMALL = {
  "data.name": "text",
  "data.tokenizer": "bytes",
  "data.sequence_length": 16,
  "model.num_layers": 2,
  "model.width": 16,
  "model.num_heads": 2,
  "model.hidden": 16,
  "moe.hidden": 16,
  "moe.num_experts": 4,
  "moe.group_size": 0,
  "train.num_steps": 4,
  "train.batch_size": 2,
  "train.eval_every": 2,
  "train.eval_batches": 1,
  "train.checkpoint_every": 4,
  "train.final_eval_tokens": 64,
  "train.sample": False,
  "train.report": False,
  "train.tensorboard": False,
}


def run(*words, **env):
  """The program's output; it must succeed."""
  done = subprocess.run(
    [sys.executable, "-m", *words],
    cwd=ROOT,
    env=os.environ | env,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
  """(directory, command line) of a finished sweep."""
  tmp = tmp_path_factory.mktemp("sweep")
  text = tmp / "text"
  text.mkdir()
  for i in range(40):
    (text / f"{i}.txt").write_text(f"document {i}: " + "a line of text " * 8)
  fields = SMALL | {"data.path": str(text), "data.cache_dir": str(tmp / "cache")}
  line = [
    "experiments.sweep",
    f"--config={ROUTER}",
    f"--workdir={tmp / 'out'}",
    "--sweep.moe.router=top_k,tempered",
    "--sweep.moe.tempered.rate=0.001,0.01",
    "--jobs=2",
    *(f"--config.{name}={value}" for name, value in fields.items()),
  ]
  run(*line)
  return tmp / "out", line


def rows(directory):
  with (directory / "results.csv").open() as file:
    return list(csv.DictReader(file))


def test_it_ends_in_results_and_a_page(sweep):
  """A row for each run, with the router's own option as a column, and all figures."""
  directory, _ = sweep
  found = rows(directory)
  assert [row["moe.tempered.rate"] for row in found] == ["", "0.001", "0.01"]
  assert {row["state"] for row in found} == {"done"}
  assert all(0 < float(row["loss"]) < 10 for row in found)
  assert "tempered" in (directory / "report.html").read_text()
  assert (directory / "figures" / "loss_curves.png").stat().st_size > 5000


def test_again_it_trains_nothing_and_says_the_same(sweep):
  directory, line = sweep
  before = {p: p.stat().st_mtime_ns for p in directory.glob("runs/*/metrics.jsonl")}
  losses = [row["loss"] for row in rows(directory)]
  run(*line)
  after = {p: p.stat().st_mtime_ns for p in directory.glob("runs/*/metrics.jsonl")}
  assert before == after and losses == [row["loss"] for row in rows(directory)]


def test_a_run_of_that_router_is_evaluated(sweep):
  """The environment names the file; without it, the error does."""
  (one,) = sweep[0].glob("runs/*rate=0.01*")
  words = ("experiments.evaluate", f"--workdir={one}", "--max_batches=1")
  assert "dropless" in run(*words, MOEJAX_ROUTERS=str(ROUTER))
  done = subprocess.run(
    [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 2 and "MOEJAX_ROUTERS=FILE" in done.stderr


def test_an_option_of_the_files_router_is_a_flag():
  """Given before the file that adds the router has been read."""
  flag = "--config.moe.tempered.rate=0.1"
  run("tools.count", flag, f"--config={ROUTER}")
