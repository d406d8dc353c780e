"""What is installed is what is here, with the versions that are pinned."""

import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from tools import update_constraints

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("moejax", "configs", "experiments", "tools")


def test_versions_that_agree_need_no_marker():
  """Also where a Python has no use for the package: it may have one tomorrow."""
  pins = {"3.11": {"a": "1", "b": "2"}, "3.12": {"a": "1"}}
  assert update_constraints.merge(pins) == ["a==1", "b==2"]


def test_versions_that_differ_are_split_by_python_without_a_gap():
  """Older Pythons than the oldest, and newer ones than the newest, have a line too."""
  pins = {
    "3.13": {"jax": "12", "numpy": "2"},
    "3.12": {"jax": "12", "numpy": "3"},
    "3.11": {"jax": "10", "numpy": "1"},
  }
  assert update_constraints.merge(pins) == [
    'jax==10 ; python_version <= "3.11"',
    'jax==12 ; python_version >= "3.12"',
    'numpy==1 ; python_version <= "3.11"',
    'numpy==3 ; python_version == "3.12"',
    'numpy==2 ; python_version >= "3.13"',
  ]


def test_every_requirement_is_pinned():
  """A dependency added to setup.py without new constraints would float."""
  text = (ROOT / "setup.py").read_text("utf-8")
  body = text[text.index("REQUIRED = [") : text.index("# Accelerators")]
  required = re.findall(r'^  "([A-Za-z0-9_.-]+)>=', body, re.MULTILINE)
  pinned = {
    line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()
  }
  assert len(required) > 15
  normal = {update_constraints.normal_name(name) for name in required}
  assert normal <= pinned


def test_an_unsupported_python_is_refused_with_a_remedy(tmp_path):
  """`make PYTHON=...` with something too old says so instead of failing later."""
  fake = tmp_path / "python3.8"
  fake.write_text("#!/bin/sh\nexit 1\n")
  fake.chmod(0o755)
  script = str(ROOT / "tools" / "find_python.sh")
  command = ["bash", script, str(fake)]
  result = subprocess.run(command, capture_output=True, text=True)
  assert result.returncode == 2
  assert "not Python 3.11 or later" in result.stderr

  environment = {"PATH": "/nowhere", "HOME": str(tmp_path)}
  command = [shutil.which("bash") or "bash", script]
  result = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert result.returncode == 2
  assert "make PYTHON=" in result.stderr


@pytest.mark.slow
def test_the_wheel_is_moejax_alone_and_works_outside_the_checkout(tmp_path):
  """A package without __init__.py or a data file left out would be missing here.

  Names as common as `tools` are not put on anyone's path; shipped configs are found by
  name all the same.
  """
  source = tmp_path / "source"
  source.mkdir()
  for name in (*COPIED, "setup.py", "pyproject.toml", "README.md", "LICENSE"):
    path = ROOT / name
    copy = shutil.copytree if path.is_dir() else shutil.copy
    copy(path, source / name)
  pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
  pip += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
  subprocess.run(pip, check=True)
  (wheel,) = tmp_path.glob("moejax-*.whl")
  inside = tmp_path / "inside"
  zipfile.ZipFile(wheel).extractall(inside)

  top = {path.name for path in inside.iterdir() if path.suffix != ".dist-info"}
  assert top == {"moejax"}
  kinds = (".py", ".html", ".css", ".js")
  here = {p.relative_to(ROOT) for p in (ROOT / "moejax").rglob("*") if p.suffix in kinds}
  configs = pathlib.Path("moejax") / "shipped_configs"
  here |= {configs / p.name for p in (ROOT / "configs").glob("*.py")}
  found = {p.relative_to(inside) for p in inside.rglob("*") if p.suffix in kinds}
  assert here == found
  assert (inside / "moejax" / "py.typed").exists()

  environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
  environment["PYTHONPATH"] = str(inside)

  def call(*arguments: str, **variables: str) -> str:
    # The working directory keeps the checkout off the path.
    result = subprocess.run(
      [sys.executable, "-m", "moejax.cli.main", *arguments],
      capture_output=True,
      text=True,
      cwd=tmp_path,
      env=environment | variables,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout

  assert "num_experts" in call("train", "--help")
  assert "mixtral_8x7b" in call("train", "--list=configs")
  # 46.7B: the published number of parameters. A config of one's own may import one.
  mine = tmp_path / "mine.py"
  mine.write_text(
    "from configs import mixtral_8x7b\nget_config = mixtral_8x7b.get_config"
  )
  assert "46,70" in call("count", f"--config={mine}")
  # So may a file that adds a router, wherever it is named.
  router = tmp_path / "router.py"
  router.write_text((ROOT / "examples" / "my_router.py").read_text())
  listed = "tempered top-k, a learned temperature"
  assert listed in " ".join(call("train", "--list=routers", f"--config={router}").split())
  shown = call("train", "--list=routers", MOEJAX_ROUTERS=str(router))
  assert listed in " ".join(shown.split())
