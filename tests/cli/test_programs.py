"""What a shell sees of a program: exit code, streams, speed. Real processes."""

import subprocess
import sys

import pytest

from moejax.cli import flags as cli
from moejax.cli import startup

PROGRAM = '''"""Trains nothing.

  python program.py
"""
import sys
from absl import flags
from moejax.cli import flags as cli
from moejax.errors import UserError

_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue.")
_SAMPLES = flags.DEFINE_integer("num_samples", 1, "How many.", lower_bound=1)
cli.define_config()

def main():
  if _PROMPT.value == "bad":
    raise UserError("--prompt=bad: too long.")
  if _PROMPT.value == "bug":
    raise ValueError("a bug")
  print(cli.get_config().moe.num_experts, flags.FLAGS.workdir)
  return 7 if _PROMPT.value == "seven" else None

if __name__ == "__main__":
  cli.run(main)
'''


def execute(tmp_path, *arguments: str) -> subprocess.CompletedProcess[str]:
  file = tmp_path / "program.py"
  file.write_text(PROGRAM)
  return subprocess.run(
    [sys.executable, str(file), *arguments], capture_output=True, text=True, timeout=120
  )


@pytest.mark.parametrize(
  ("argument", "part"),
  [
    ("--config.moe.num_expert=3", "Did you mean --config.moe.num_experts?"),
    ("--config=nowhere.py", "no such file"),
    ("--num_samples=0", "num_samples"),
    ("--prompt=bad", "--prompt=bad: too long."),
  ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(tmp_path, argument, part):
  result = execute(tmp_path, argument)
  assert result.returncode == 2
  assert result.stdout == ""
  assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
  assert part in result.stderr


def test_a_bug_keeps_its_traceback(tmp_path):
  """Only what the user can mend is cut to a line."""
  result = execute(tmp_path, "--prompt=bug")
  assert result.returncode == 1
  assert "Traceback" in result.stderr and "a bug" in result.stderr


def test_a_good_line_runs_main_and_exits_with_what_it_returns(tmp_path):
  result = execute(
    tmp_path, "--prompt=seven", "--workdir=w", "--config.moe.num_experts=3"
  )
  assert (result.returncode, result.stdout) == (7, "3 w\n"), result.stderr


def test_help_is_short_and_true(tmp_path):
  """It shows the program's own text and flags and every field, and nothing of absl's."""
  result = execute(tmp_path, "--help")
  assert result.returncode == 0
  assert result.stdout.startswith("Trains nothing.")
  for word in (
    "--prompt",
    "--num_samples",
    "--workdir",
    "num_experts",
    "checkpoint_every",
  ):
    assert word in result.stdout
  assert "--verbosity" not in result.stdout
  assert result.stdout.count("\n") < 48
  assert max(map(len, result.stdout.splitlines())) <= 90


def test_examples_in_help_keep_their_line_breaks():
  """They are to be copied: a backslash, and the next line below it."""
  command = [sys.executable, "-m", "experiments.train", "--help"]
  result = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert "--workdir=runs/default \\\n    --config.moe" in result.stdout


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
  """As `--help | head -1`: no traceback, whatever is left to print."""
  (tmp_path / "program.py").write_text(PROGRAM)
  command = f"{sys.executable} program.py --help | (exec <&-; sleep 1)"
  result = subprocess.run(
    ["bash", "-c", command + "; exit ${PIPESTATUS[0]}"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert (result.returncode, result.stderr) == (141, "")


def test_programs_without_a_config_say_a_mistake_in_one_line(capsys):
  parser = cli.Parser("Measures.")
  parser.add_argument("--rounds", type=int)
  for line in (["--rounds=x"], ["--round=1"], ["--zzz"]):
    with pytest.raises(SystemExit) as error:
      parser.parse_args(line)
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1


def test_list_shows_every_registered_name(tmp_path):
  for what, names in {
    "configs": ["default"],
    "routers": ["switch", "top2", "top_k"],
    "datasets": ["python_stdlib", "text"],
    "dispatchers": ["auto", "einsum", "gather", "grouped"],
  }.items():
    result = execute(tmp_path, f"--list={what}")
    assert result.returncode == 0, result.stderr
    listed = {line.split()[0] for line in result.stdout.splitlines()}
    assert listed >= set(names)


def test_a_misspelt_flag_is_refused_before_jax_is_imported():
  """An error that could be instant should not wait for a second of imports."""
  code = (
    "import sys\nfrom moejax.cli import flags as cli\ncli.define_config()\n"
    "cli.parse(['p', '--config.moe.num_experts=4'])\ncli.load_config('default')\n"
    "try:\n  cli.parse(['p', '--config.moe.num_expert=4'])\n"
    "except cli.ConfigError:\n  print('jax' in sys.modules)\n"
  )
  command = [sys.executable, "-c", code]
  result = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert result.stdout == "False\n", result.stderr


def test_the_first_line_comes_before_jax():
  """What is announced is on screen before the seconds that importing jax takes."""
  code = (
    "import sys\nfrom moejax.cli import flags as cli, startup\ncli.define_config()\n"
    "cli.parse(['p'])\n"
    "cli.get_config(announce=lambda: startup.announce(str('jax' in sys.modules)))\n"
  )
  command = [sys.executable, "-c", code]
  result = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert result.stdout == "False\n", result.stderr


@pytest.mark.parametrize("name", ["JAX_PROCESS_ID", "SLURM_PROCID", "TPU_WORKER_ID"])
def test_only_the_first_process_announces(monkeypatch, capsys, name):
  """Known before jax is there, from the launcher's variables or the flag."""
  for variable in startup._INDEX_VARIABLES:
    monkeypatch.delenv(variable, raising=False)
  startup.announce("alone")
  monkeypatch.setenv(name, "0")
  startup.announce("first")
  monkeypatch.setenv(name, "1")
  startup.announce("second")
  startup.announce("first by flag", 0)
  startup.announce("second by flag", 1)
  assert capsys.readouterr().out == "alone\nfirst\nfirst by flag\n"


_PRESSED = """
import os, signal, sys
# A test run that was started in the background hands on that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from absl import flags
from moejax.cli import flags as cli

class Lost:
  def __del__(self):
    signal.raise_signal(signal.SIGINT)

def main():
  if sys.argv[-1] == "--how=import":
    try:
      signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
      raise ImportError("initializing the extension")
  lost = Lost()
  del lost
  signal.sigtimedwait([], 20)
  print("went on")

flags.DEFINE_string("how", "", "")
cli.run(main)
"""


@pytest.mark.parametrize("how", ["import", "callback"])
def test_ctrl_c_is_one_line_wherever_it_falls(tmp_path, how):
  """In an import that makes an ImportError of it; in a destructor, where it is lost."""
  file = tmp_path / "program.py"
  file.write_text(_PRESSED)
  command = [sys.executable, str(file), f"--how={how}"]
  result = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert (result.returncode, result.stdout) == (130, ""), result.stderr
  assert result.stderr == "interrupted\n"
