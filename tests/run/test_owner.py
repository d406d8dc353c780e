"""Whose run: a config from elsewhere names no path that evaluation takes from it."""

import json
import pathlib
import subprocess
import sys

import pytest

from moejax.checkpoint.read import pack_meta, read_meta
from moejax.config import Config
from moejax.errors import UserError
from moejax.run import owner
from tests.experiments.test_command_lines import QUICK


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
  return tmp_path / "home"


def config(path="text", cache_dir="cache") -> Config:
  made = Config()
  made.data.name, made.data.path, made.data.cache_dir = "text", path, cache_dir
  return made


def test_a_run_of_one_s_own_is_used_as_it_is():
  """The usual case asks for nothing."""
  mine = config()
  assert owner.own_paths(mine, owner.mark(mine), (), "run") is mine


@pytest.mark.parametrize("changed", [config(path="/etc"), config(cache_dir="/")])
def test_a_mark_is_of_these_paths_and_of_this_user(changed, monkeypatch, tmp_path):
  """Not of others in the same run, nor by another key."""
  mark = owner.mark(config())
  assert mark is not None
  assert owner.is_own(config(), mark) and not owner.is_own(changed, mark)
  for forged in (None, 3, "", "\ud800", mark[:-1], mark.upper()):
    assert not owner.is_own(config(), forged)
  monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another"))
  assert not owner.is_own(config(), mark)
  assert owner.mark(config()) not in (None, mark)


def test_paths_of_a_run_from_elsewhere_must_be_given():
  """The text is refused by name; the cache is one's own; what is given is used."""
  with pytest.raises(UserError, match="--config.data.path='text'.* set .*path=text expl"):
    owner.own_paths(config(), None, (), "run")
  used = owner.own_paths(config(), None, ("data.path",), "run")
  assert (used.data.path, used.data.cache_dir) == ("text", "")
  both = owner.own_paths(config(), None, ("data.path", "data.cache_dir"), "run")
  assert both.data.cache_dir == "cache"
  plain = config("", "")
  assert owner.own_paths(plain, None, (), "run") is plain
  assert owner.own_paths(config(path=""), None, (), "run").data.cache_dir == ""


def test_the_key_is_one_and_for_nobody_else_to_read(home):
  """Made once, by whichever process is first; a spoilt one is made again."""
  first = owner.mark(config())
  key = home / "moejax" / "key"
  assert key.stat().st_mode & 0o077 == 0 and len(key.read_bytes()) == 32
  assert owner.mark(config()) == first
  key.write_bytes(b"")
  assert owner.mark(config()) != first and len(key.read_bytes()) == 32
  assert [p.name for p in key.parent.iterdir()] == ["key"]


def test_without_a_place_for_the_key_there_is_no_mark(home):
  """Training goes on; evaluation then asks for the paths."""
  home.write_text("a file in the way")
  assert owner.mark(config()) is None and not owner.is_own(config(), None)


@pytest.mark.slow
def test_evaluation_of_a_foreign_run_touches_no_path_of_its_config(tmp_path):
  """The programs themselves: one's own run, then the same as if another had made it."""
  run, cache = tmp_path / "run", tmp_path / "theirs"

  def call(program, *args):
    command = [sys.executable, "-m", f"experiments.{program}", f"--workdir={run}", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)

  settings = [f"--config.{setting}" for setting in QUICK]
  path = next(s for s in settings if s.startswith("--config.data.path="))
  done = call("train", *settings, f"--config.data.cache_dir={cache}")
  assert done.returncode == 0, done.stderr
  done = call("evaluate")
  assert done.returncode == 0, done.stderr
  theirs = tmp_path / "written"
  for step in (run / "checkpoints").iterdir():
    meta = read_meta(step)
    meta["config"]["data"]["cache_dir"] = str(theirs)
    (step / "meta" / "metadata").write_text(pack_meta(meta))
  done = call("evaluate")
  assert done.returncode == 2 and not theirs.exists()
  (line,) = [x for x in done.stderr.splitlines() if x.startswith("error:")]
  assert path in line and "was not trained by this user" in line
  mine = tmp_path / "mine"
  done = call("evaluate", path, f"--config.data.cache_dir={mine}", "--max_batches=1")
  assert done.returncode == 0, done.stderr
  assert mine.exists() and not theirs.exists()
  assert json.loads((run / "eval_4_validation.json").read_text())["is_training_dataset"]
  assert call("generate", "--max_tokens=3").returncode == 0
  assert not pathlib.Path(theirs).exists()
