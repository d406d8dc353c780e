"""A sweep's directory: claimed by one sweep and one process, or refused in one line."""

import json
import subprocess
import sys

import pytest

from moejax.cli import flags as cli
from moejax.config import text as config_text
from moejax.errors import ConfigError, UserError
from moejax.run import claim
from moejax.sweep.execution import directory
from tests.sweep.execution import runs

SPEC = {"axes": {"moe.num_experts": [2, 4]}, "seeds": 2}


def enter(path, spec=SPEC, **options):
  with directory.opened(path, spec, **options):
    pass


def test_the_first_use_stores_the_specification_and_the_second_goes_on(tmp_path):
  enter(tmp_path / "sweep")
  enter(tmp_path / "sweep")
  assert json.loads((tmp_path / "sweep" / "spec.json").read_text()) == SPEC
  assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == ["runs", "spec.json"]


def test_another_specification_is_refused_with_what_changed(tmp_path):
  """Every difference is named, and the stored one stays unless the flag is given."""
  enter(tmp_path)
  other = {"axes": {"moe.num_experts": [2, 8]}, "seeds": 3}
  with pytest.raises(ConfigError) as error:
    enter(tmp_path, other)
  text = str(error.value)
  assert "axes.moe.num_experts was [2, 4] and is now [2, 8]" in text
  assert "seeds was 2 and is now 3" in text
  assert "--allow_changes" in text and "\n" not in text
  assert directory.read_spec(tmp_path) == SPEC
  enter(tmp_path, other, allow_changes=True)
  assert directory.read_spec(tmp_path) == other


def test_a_caller_s_comparison_is_asked_for_the_differences(tmp_path):
  """The comparison decides: what it calls equal is no other sweep."""
  enter(tmp_path)
  enter(tmp_path, SPEC | {"revision": "abc"}, differences=lambda old, new: [])
  with pytest.raises(ConfigError, match="holds another sweep: the code changed. Give"):
    enter(tmp_path, differences=lambda old, new: ["the code changed"])


@pytest.mark.parametrize("content", ["{", "[1]", '"a"'])
def test_a_damaged_specification_is_one_line_with_the_remedy(tmp_path, content):
  (tmp_path / "spec.json").write_text(content)
  with pytest.raises(
    UserError, match=r"spec.json .*Restore it, or move it away"
  ) as error:
    enter(tmp_path, allow_changes=True)
  assert "\n" not in str(error.value)
  assert (tmp_path / "spec.json").read_text() == content


@pytest.mark.parametrize(
  ("name", "part"),
  [("config.json", "holds an ordinary run"), ("thesis.tex", "it holds thesis.tex")],
)
def test_a_directory_with_other_things_is_refused_and_left_alone(tmp_path, name, part):
  (tmp_path / name).write_text("{}")
  with pytest.raises(UserError, match=part):
    enter(tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_second_scheduler_is_refused_at_once_and_a_killed_one_does_not_lock(tmp_path):
  """The lock ends with the process, kill -9 included."""
  code = (
    "import pathlib, sys, time\n"
    "from moejax.sweep.execution import directory\n"
    f"with directory.opened(pathlib.Path(sys.argv[1]), {SPEC!r}):\n"
    "  print('held', flush=True)\n"
    "  time.sleep(60)\n"
  )
  command = [sys.executable, "-c", code, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert claim.is_locked(tmp_path)
    with pytest.raises(UserError, match="in use by another live sweep"):
      enter(tmp_path)
    holder.kill()
  assert not claim.is_locked(tmp_path)
  enter(tmp_path)


def test_the_config_file_of_a_run_gives_back_its_config(tmp_path):
  """With a router's own options and values that JSON lacks; unchanged, it stays."""
  config = runs.config()
  config.moe.use_router("top2", second_policy="all")
  config.moe.capacity_factor = None
  path = directory.write_config(tmp_path / "run", "a=1", config)
  loaded = cli.load_config(str(path))
  assert config_text.difference(config, loaded) == []
  before = path.stat().st_mtime_ns
  directory.write_config(tmp_path / "run", "a=1", config)
  assert path.stat().st_mtime_ns == before
