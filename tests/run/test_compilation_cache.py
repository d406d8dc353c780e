"""The cache of compiled programs: where it is, when it is not used, what damage does."""

import collections
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from absl.testing import flagsaver
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from moejax.data.cache import ENV
from moejax.run import compilation_cache

_NAMES = (
  "jax_compilation_cache_dir",
  "jax_enable_compilation_cache",
  "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def _jax(monkeypatch):
  """A program's flags and no variable of jax's; everything as before afterwards."""
  compilation_cache.define_flag()
  for name in compilation_cache._VARIABLES:
    monkeypatch.delenv(name, raising=False)
  before = {name: getattr(jax.config, name) for name in _NAMES}
  monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
  with flagsaver.flagsaver(compilation_cache=None):
    yield
  for name, value in before.items():
    jax.config.update(name, value)
  jax_cache.reset_cache()


def setting(name: str) -> Any:
  return getattr(jax.config, name)


def give(directory) -> None:
  flags = compilation_cache.flags.FLAGS
  flags.compilation_cache = str(directory)


def test_it_lies_with_the_prepared_data(tmp_path, monkeypatch):
  """In --config.data.cache_dir, or where $MOEJAX_CACHE says; named by what runs it."""
  monkeypatch.setenv(ENV, str(tmp_path / "default"))
  for given, root in (("", "default"), (str(tmp_path / "own"), "own")):
    directory = compilation_cache.enable(given)
    assert directory is not None and directory.parent == tmp_path / root / "xla"
    assert jax.__version__ in directory.name
    assert setting("jax_compilation_cache_dir") == str(directory)
    assert directory.stat().st_mode & 0o077 == 0


def test_the_flag_wins_and_none_turns_it_off(tmp_path):
  give(tmp_path / "mine")
  directory = compilation_cache.enable(str(tmp_path / "data"))
  assert directory is not None and directory.parent == tmp_path / "mine"
  give("none")
  assert compilation_cache.enable(str(tmp_path / "data")) is None
  assert not setting("jax_enable_compilation_cache")
  assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", compilation_cache._VARIABLES)
def test_what_jax_was_told_is_left_alone(tmp_path, monkeypatch, name):
  """Those who set its variables have decided."""
  monkeypatch.setenv(name, "")
  before = setting("jax_compilation_cache_dir")
  assert compilation_cache.enable(str(tmp_path / "data")) is None
  assert setting("jax_compilation_cache_dir") == before
  assert not (tmp_path / "data").exists()


def test_several_processes_use_only_a_directory_that_was_given(tmp_path, monkeypatch):
  """By default each machine would have its own, and some would compile and some not."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert compilation_cache.enable(str(tmp_path / "data")) is None
  give(tmp_path / "shared")
  assert compilation_cache.enable(str(tmp_path / "data")) is not None


def test_a_directory_that_cannot_be_used_is_a_warning(tmp_path, monkeypatch, caplog):
  """A file in the way, and a full disk: one line with the remedy, and no cache."""
  (tmp_path / "file").write_text("")
  before = setting("jax_compilation_cache_dir")
  give(tmp_path / "file")
  assert compilation_cache.enable("") is None
  usage = collections.namedtuple("usage", "total used free")
  monkeypatch.setattr(
    compilation_cache.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1 << 20)
  )
  give(tmp_path / "full")
  assert compilation_cache.enable("") is None
  assert setting("jax_compilation_cache_dir") == before
  lines = [record.getMessage() for record in caplog.records]
  assert len(lines) == 2 and all("--compilation_cache=DIR" in line for line in lines)
  assert "file" in lines[0] and "has only 1 MB left" in lines[1]


def test_another_processor_has_another_directory(tmp_path, monkeypatch):
  """The same kind shares one, whatever its clock does at the moment."""
  text = "model name\t: A\nflags\t\t: avx {}\ncpu MHz\t: {}\n\nmodel name\t: A\n"
  monkeypatch.setattr(compilation_cache, "_CPUINFO", tmp_path / "cpuinfo")
  names = []
  for flags, clock in (("", 1), ("", 2), ("avx512f", 1)):
    (tmp_path / "cpuinfo").write_text(text.format(flags, clock))
    names.append(compilation_cache.machine())
  assert names[0] == names[1] != names[2]


def test_a_damaged_entry_is_compiled_again_and_replaced(tmp_path, caplog):
  """What a killed write left is a warning once, and not at every start."""
  give(tmp_path)
  directory = compilation_cache.enable("")
  assert directory is not None
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

  def compute() -> float:
    jax_cache.reset_cache()
    # A new function each time: what is in memory is not what is tested.
    return float(jax.jit(lambda x: jnp.sin(x) * 3)(jnp.float32(2)))

  want = compute()
  [entry] = directory.glob("jit__lambda*-cache")
  whole = entry.stat().st_size
  entry.write_bytes(entry.read_bytes()[: whole // 2])
  with warnings.catch_warnings():
    # pytest makes errors of warnings and has a hook of its own.
    warnings.simplefilter("default")
    warnings.showwarning = lambda *args, **more: None
    compilation_cache._mend(directory)
    assert compute() == want
  [line] = [r.getMessage() for r in caplog.records]
  assert "damaged entry" in line and str(directory) in line
  assert entry.stat().st_size == pytest.approx(whole, rel=0.1)
  assert compute() == want
