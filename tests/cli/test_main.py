"""The `moejax` command: every program by one name, the same as in a clone."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.cli.main import PROGRAMS

ROOT = Path(__file__).parents[2]
IN_A_CLONE = {
  "train": "experiments.train",
  "evaluate": "experiments.evaluate",
  "analyze": "experiments.analyze",
  "profile": "experiments.profile",
  "sweep": "experiments.sweep",
  "generate": "experiments.generate",
  "convert": "experiments.convert",
  "surgery": "tools.surgery",
  "count": "tools.count",
  "compare": "tools.compare",
  "collectives": "tools.collectives",
  "compile-for": "tools.compile_for",
  "plan": "tools.plan",
  "launch": "tools.launch",
  "launch-local": "tools.launch_local",
  "fit-law": "tools.fit_law",
  "check-device": "tools.check_device",
  "inspect-checkpoint": "tools.inspect_checkpoint",
}


def call(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-m", module, *arguments]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_overview_names_every_program_and_imports_none():
  out = call("moejax.cli.main").stdout
  assert out == call("moejax.cli.main", "--help").stdout
  rows = [line.split() for line in out.splitlines() if line.startswith("  ")]
  assert [row[0] for row in rows] == list(PROGRAMS)
  assert all(len(row) > 4 for row in rows)


@pytest.mark.parametrize("argument", ["", "--help"])
def test_a_reader_may_leave_early(argument):
  """As `| head -1` does: no traceback."""
  command = f"{sys.executable} -m moejax.cli.main {argument} | true"
  shell = ["bash", "-c", command]
  done = subprocess.run(shell, capture_output=True, text=True, cwd=ROOT, timeout=60)
  assert (done.stdout, done.stderr) == ("", "")


def test_an_unknown_program_is_one_line():
  done = call("moejax.cli.main", "trian", "--workdir=x")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == (
    "error: moejax trian: there is no such program. Did you mean train?\n"
  )


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_takes_the_same_flags_in_a_clone(name):
  """The thin file there runs the same module, and --help says the same, but for the names
  of programs."""
  thin = (ROOT / (IN_A_CLONE[name].replace(".", "/") + ".py")).read_text()
  assert len(thin.splitlines()) == 6 and ".run()" in thin
  out = call("moejax.cli.main", name, "--help").stdout
  there = call(IN_A_CLONE[name], "--help").stdout
  for other, module in IN_A_CLONE.items():
    assert f"python -m {module} " not in out
    there = re.sub(rf"python -m {module}\b", f"moejax {other}", there)
  # argparse begins with the program's name, wrapped by its length.
  if name in ("launch-local", "fit-law", "compare", "check-device"):
    out, there = (text.partition("\n\n")[2] for text in (out, there))
  assert out == there and len(out) > 200
  assert importlib.util.find_spec(PROGRAMS[name]) is not None


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="Linux alone has it")
def test_the_name_of_a_process_has_no_space(tmp_path):
  """Slurm's tracking of processes (linuxproc) does not find one that has."""
  config = tmp_path / "c.py"
  config.write_text(
    "import pathlib, configs.default\n"
    "def get_config():\n"
    "  print(pathlib.Path('/proc/self/comm').read_text().strip())\n"
    "  return configs.default.get_config()\n"
  )
  done = call("moejax.cli.main", "count", f"--config={config}")
  assert done.stdout.splitlines()[0] == "moejax-count"


def test_a_program_ends_with_its_own_exit_code():
  done = call("moejax.cli.main", "train", "--config.moe.num_expert=4")
  assert done.returncode == 2 and "Did you mean --config.moe.num_experts?" in done.stderr
