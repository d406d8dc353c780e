"""Testing under every Python: the scripts, with fake interpreters and a fake make."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAKE = """\
#!/bin/sh
echo "$@" >> calls
case "$*" in
  setup*) exit 0 ;;
  *3.12*) echo "==== 1 failed, 6 passed in 2.00s ===="; exit 2 ;;
  *) echo "==== 7 passed in 1.00s ===="; echo "a line of make's" ;;
esac
"""


def script(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
  """A directory with the scripts, a fake make, and a .venv of Python 3.13."""
  for name in ("find_python.sh", "test_matrix.sh"):
    (tmp_path / "tools").mkdir(exist_ok=True)
    shutil.copy(ROOT / "tools" / name, tmp_path / "tools" / name)
  script(tmp_path / "bin" / "make", MAKE)
  script(tmp_path / ".venv" / "bin" / "python", "#!/bin/sh\necho 3.13\n")
  return tmp_path


def install(checkout: pathlib.Path, version: str) -> None:
  """An interpreter under ~/.pyenv that passes for supported."""
  path = checkout / ".pyenv" / "versions" / f"{version}.4" / "bin" / "python"
  script(path, "#!/bin/sh\nexit 0\n")


def run(checkout: pathlib.Path, name: str, *args: str) -> subprocess.CompletedProcess:
  """A script, with nothing on the PATH but what the system's own folders hold."""
  folders = [str(checkout / "bin"), *_system_folders(checkout)]
  environment = {"PATH": os.pathsep.join(folders), "HOME": str(checkout)}
  command = [shutil.which("bash") or "bash", f"tools/{name}", *args]
  return subprocess.run(
    command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60
  )


def _system_folders(checkout: pathlib.Path) -> list[str]:
  """Links to the tools that the scripts call, so that no real Python is on the PATH."""
  links = checkout / "links"
  links.mkdir(exist_ok=True)
  for tool in ("bash", "sh", "sed", "grep", "tail", "tee", "cat", "rm", "mktemp"):
    link, found = links / tool, shutil.which(tool)
    if found and not link.exists():
      link.symlink_to(found)
  script(links / "dirname", f'#!/bin/sh\nexec {shutil.which("dirname")} "$@"\n')
  return [str(links)]


def test_a_missing_interpreter_is_named_and_is_no_failure(checkout):
  """3.11 is there, 3.12 is not: .venv's own Python last, with pytest's line the last."""
  install(checkout, "3.11")
  done = run(checkout, "test_matrix.sh", "test", "test-core")
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.splitlines()[-3:] == [
    "not tested: Python 3.12 is neither on the PATH nor under ~/.pyenv",
    "pytest (test-core, Python 3.11): 7 passed in 1.00s",
    "pytest (test, Python 3.13): 7 passed in 1.00s",
  ]
  calls = (checkout / "calls").read_text().splitlines()
  assert calls == [
    "setup VENV=.venv",
    "test-core VENV=.venv-3.11 PYTHON=3.11",
    "test VENV=.venv",
  ]


def test_a_failure_under_one_python_fails_all_and_stops_none(checkout):
  """3.12 fails: the others run, the exit code is not zero, its line says why."""
  install(checkout, "3.11")
  install(checkout, "3.12")
  done = run(checkout, "test_matrix.sh", "test")
  assert done.returncode == 1
  assert done.stdout.splitlines()[-3:] == [
    "pytest (test, Python 3.11): 7 passed in 1.00s",
    "pytest (test, Python 3.12): 1 failed, 6 passed in 2.00s",
    "pytest (test, Python 3.13): 7 passed in 1.00s",
  ]


def test_what_does_not_finish_says_so(checkout):
  """A run that dies before pytest counts anything, and a set-up that fails."""
  script(checkout / "bin" / "make", '#!/bin/sh\n[ "$1" = setup ] || kill -9 $$\n')
  done = run(checkout, "test_matrix.sh", "test")
  assert done.returncode == 1
  assert done.stdout.splitlines()[-1] == "pytest (test, Python 3.13): did not finish"
  script(checkout / "bin" / "make", "#!/bin/sh\nexit 2\n")
  done = run(checkout, "test_matrix.sh", "test")
  assert done.returncode == 1
  assert "could not be set up" in done.stdout.splitlines()[-1]


def test_an_interpreter_is_found_by_its_version(checkout):
  """PYTHON=3.12: the one under ~/.pyenv; an older or missing one is refused by name."""
  install(checkout, "3.12")
  done = run(checkout, "find_python.sh", "3.12")
  assert done.returncode == 0
  assert done.stdout.strip().endswith("3.12.4/bin/python")
  install(checkout, "3.10")
  for version in ("3.10", "3.13"):
    done = run(checkout, "find_python.sh", version)
    assert done.returncode == 2 and f"PYTHON={version}" in done.stderr


def test_the_versions_tested_are_the_versions_pinned():
  """One list in a script and one in constraints.txt, of which no third is needed."""
  text = (ROOT / "tools" / "test_matrix.sh").read_text()
  [line] = [line for line in text.splitlines() if line.startswith("versions=")]
  versions = line.partition("=")[2].strip('"').split()
  header = (ROOT / "constraints.txt").read_text().splitlines()[0]
  assert header.endswith(f"for Python {', '.join(versions)}; do not edit.")
