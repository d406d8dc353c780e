"""The cache under several processes and under kill -9: whole or not there."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moejax.data import cache, load
from moejax.errors import ConfigError, UserError
from moejax.storage.full import save_array
from tests.data.conftest import small_config

ROOT = Path(__file__).parents[2]

LOAD = """
import sys
from moejax.config import DataConfig
from moejax.data import load
d = load(DataConfig(name="text", path={path!r}, cache_dir={cache!r}, sequence_length=64))
print(d.fingerprint, d.num_tokens("train"))
"""

SLOW_BUILD = """
import time, pathlib
from moejax.data import cache
def build(directory):
  (directory / "half").write_text("half")
  print("building", flush=True)
  time.sleep(60)
cache.build_once(pathlib.Path({final!r}), build, what="a test")
"""


def start(program: str) -> subprocess.Popen:
  """A real process."""
  return subprocess.Popen(
    [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )


def test_processes_that_prepare_at_once_agree(tmp_path, small):
  """Two start together on an empty cache: one builds, one waits, both read."""
  program = LOAD.format(path=small.config.path, cache=str(tmp_path))
  processes = [start(program) for _ in range(2)]
  outputs = [p.communicate(timeout=120)[0] for p in processes]
  assert [p.returncode for p in processes] == [0, 0]
  assert set(outputs) == {f"{small.fingerprint} {small.num_tokens('train')}\n"}
  assert not list(tmp_path.rglob("*.tmp-*"))


def test_a_killed_build_leaves_nothing_half_used(tmp_path):
  """Kill -9 while building: not finished, not locked, and cleaned up by the next."""
  final = tmp_path / "thing"
  process = start(SLOW_BUILD.format(final=str(final)))
  assert process.stdout is not None and process.stdout.readline() == "building\n"
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  assert not final.exists() and len(list(tmp_path.glob("thing.tmp-*"))) == 1
  began = time.monotonic()
  cache.build_once(final, lambda d: (d / "whole").touch() or None, what="a test")
  assert time.monotonic() - began < 5
  assert [p.name for p in final.iterdir()] == ["whole"]
  assert not list(tmp_path.glob("thing.tmp-*"))


@pytest.mark.slow
def test_loading_survives_kills_at_any_moment(tmp_path, small):
  """Killed after ever longer, then left alone: the result is the unbroken one."""
  config = small_config(tmp_path)
  program = LOAD.format(path=small.config.path, cache=str(tmp_path))
  for tenths in range(10, 40, 3):
    process = start(program)
    time.sleep(tenths / 10)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
  dataset = load(config)
  assert dataset.fingerprint == small.fingerprint
  assert list(dataset.raw_bytes("train")) == list(small.raw_bytes("train"))
  assert not list(tmp_path.rglob("*.tmp-*"))


def test_a_failed_build_leaves_nothing(tmp_path):
  """An error passes through, and the next attempt builds."""

  def fail(directory: Path) -> None:
    (directory / "half").touch()
    raise OSError("no space left")

  with pytest.raises(OSError, match="no space"):
    cache.build_once(tmp_path / "thing", fail, what="a test")
  assert [p.name for p in tmp_path.iterdir()] == [".locks"]
  cache.build_once(tmp_path / "thing", lambda d: None, what="a test")


def of_the_system(directory: Path) -> None:
  raise OSError(errno.ENOSPC, "No space left on device")


def of_a_library(directory: Path) -> None:
  """As TFDS and its writer in C++ say it."""
  raise RuntimeError(f"write() failed: No space left on device; writing {directory}/a")


def of_an_array(directory: Path) -> None:
  """Numpy's own file would fail without a reason."""
  with open("/dev/full", "wb") as file:
    save_array(file, np.zeros(100_000))


@pytest.mark.parametrize("fail", [of_the_system, of_a_library, of_an_array])
def test_a_full_disk_is_a_clear_error(tmp_path, fail):
  """It names what did not fit and the flag, and leaves nothing."""

  with pytest.raises(UserError, match=r"disk is full: a test .*cache_dir"):
    cache.build_once(tmp_path / "thing", fail, what="a test")
  assert [p.name for p in tmp_path.iterdir()] == [".locks"]


def test_a_cache_that_cannot_be_written_still_serves_what_it_has(tmp_path, monkeypatch):
  """Shared read-only caches work; only preparing something new is refused."""
  final = cache.build_once(tmp_path / "thing", lambda d: None, what="a test")

  def refuse(*args, **kwargs):
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr("builtins.open", refuse)
  assert cache.build_once(final, lambda d: None, what="a test") == final
  with pytest.raises(ConfigError, match=r"cache_dir=.*not writable"):
    cache.build_once(tmp_path / "new", lambda d: None, what="a test")


@pytest.mark.parametrize(
  ("file", "content"),
  [
    ("tokens/*/meta.json", b"{"),
    ("tokens/*/meta.json", b"[" * 100_000),
    ("tokens/*/train.tokens", b""),
    ("tokens/*/train.tokens", b"odd"),
    ("tokens/*/train.tokens", bytes(64)),
    ("tokens/*/train.offsets.npy", b"x"),
    ("tokens/*/train.domains.npy", b""),
  ],
)
def test_a_damaged_entry_is_named_with_the_remedy(tmp_path, file, content):
  """One line that says what to delete, where a traceback or wrong tokens were."""
  config = small_config(tmp_path)
  load(config)
  (path,) = (p for p in tmp_path.glob(file) if ".locks" not in p.parts)
  path.write_bytes(content)
  with pytest.raises(UserError, match=f"{path.parent}, in the cache, .* Delete it"):
    next(load(config).train_batches(2, seed=0))
