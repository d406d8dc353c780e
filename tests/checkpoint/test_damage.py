"""Damage and full disks: whatever happens to files, no wrong bit is ever restored."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import files
from moejax.checkpoint import orbax as checkpoint_orbax
from moejax.checkpoint.manager import DIRECTORY, list_steps, peek, restore_params
from moejax.checkpoint.read import pack_meta, read_meta
from moejax.errors import UserError
from tests.checkpoint import test_manager as helpers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
  """Two good checkpoints, to be copied and damaged."""
  path = tmp_path_factory.mktemp("pristine")
  states = helpers.save_steps(path, [1, 2])
  return path, states


@pytest.fixture
def run(pristine, tmp_path):
  shutil.copytree(pristine[0], tmp_path / "run")
  return tmp_path / "run", pristine[1]


def restore(workdir, state):
  """Restores the newest whole one; returns state, meta and what was said."""
  said = []
  checkpoints = helpers.open_checkpoints(workdir, warn=said.append)
  try:
    restored, meta = checkpoints.restore(helpers.shapes(state))
  finally:
    checkpoints.close()
  return restored, meta, said


def files_of(step_directory):
  """Every file of a checkpoint, by a name that does not vary between saves."""
  paths = sorted(p for p in step_directory.rglob("*") if p.is_file())
  return [p.relative_to(step_directory) for p in paths]


def assert_restored_or_set_aside(workdir, states, changed):
  """The property: exact bits of step 2, or of step 1 with step 2 set aside and named."""
  restored, meta, said = restore(workdir, states[1])
  helpers.assert_identical(restored, states[meta["step"]])
  aside = workdir / DIRECTORY / "2.damaged"
  assert aside.exists() == (meta["step"] == 1), changed
  if meta["step"] == 1:
    assert len(said) == 1 and str(workdir / DIRECTORY / "2") in said[0]
    assert "set aside as 2.damaged, using step 1" in said[0]
  return meta["step"]


HARMLESS = {"_CHECKPOINT_METADATA", "_sharding", "commit_success.txt"}
"""Orbax's notes that a restore into given shapes and shardings can do without."""


@pytest.mark.parametrize("how", ["truncated", "deleted"])
def test_a_damaged_file_of_any_kind_never_gives_wrong_bits(run, how):
  """Each file of the newest checkpoint in turn is cut to half or removed."""
  workdir, states = run
  copy = workdir.with_name("copy")
  used = {}
  for file in files_of(workdir / DIRECTORY / "2"):
    shutil.copytree(workdir, copy)
    victim = copy / DIRECTORY / "2" / file
    if how == "deleted":
      victim.unlink()
    else:
      os.truncate(victim, victim.stat().st_size // 2)
    used[file] = assert_restored_or_set_aside(copy, states, f"{file} {how}")
    shutil.rmtree(copy)
  needed = [f for f in used if f.name not in HARMLESS and "ocdbt.process" not in str(f)]
  assert needed and all(used[f] == 1 for f in needed), used


def test_a_flipped_byte_is_noticed_where_the_values_lie(run):
  """Whichever byte of the largest file is flipped, the exact bits are not expected."""
  workdir, states = run
  directory = workdir / DIRECTORY / "2"
  largest = max(files_of(directory), key=lambda f: (directory / f).stat().st_size)
  size = (directory / largest).stat().st_size
  for position in np.linspace(0, size - 1, 6).astype(int):
    copy = workdir.with_name(f"copy{position}")
    shutil.copytree(workdir, copy)
    with open(copy / DIRECTORY / "2" / largest, "r+b") as file:
      file.seek(position)
      byte = file.read(1)[0]
      file.seek(position)
      file.write(bytes([byte ^ 0x10]))
    assert_restored_or_set_aside(copy, states, f"{largest} at {position}")


def test_a_changed_meta_file_is_damage(run):
  """Meta carries its own checksum: an edited position would resume wrongly."""
  workdir, states = run
  path = workdir / DIRECTORY / "2" / "meta" / "metadata"
  text = path.read_text()
  assert '"step": 2' in text
  path.write_text(text.replace('"step": 2', '"step": 3'))
  assert assert_restored_or_set_aside(workdir, states, "meta") == 1


_LEAF = {"shape": [2], "dtype": "float32", "sum": "0"}


@pytest.mark.parametrize(
  "forged",
  [
    {"leaves": []},
    {"leaves": {"params.w": _LEAF | {"shape": [-1]}}},
    {"leaves": {"params.w": _LEAF | {"shape": ["2"]}}},
    {"leaves": {"params.w": _LEAF | {"dtype": "object"}}},
    {"leaves": {"params.w": _LEAF | {"dtype": 3}}},
    {"leaves": {"params.w": _LEAF | {"sum": "x"}}},
    {"leaves": {"params.w": {}}},
    {"leaves": {"params.w": _LEAF, "params.w.x": _LEAF}},
    {"config": 3},
    {"step": "../../1"},
    {"format": "1"},
  ],
)
def test_a_forged_meta_file_is_damage_and_no_traceback(run, forged):
  """Its checksum is right, as anyone can make it; what readers rely on is not."""
  workdir, _ = run
  meta = read_meta(workdir / DIRECTORY / "2") | forged
  (workdir / DIRECTORY / "2" / "meta" / "metadata").write_text(pack_meta(meta))
  _, _, found = restore_params(workdir)
  assert found["step"] == 1
  with pytest.raises(UserError, match="step 2"):
    peek(workdir, 2)


def test_endless_nesting_and_what_is_no_file_are_damage(run):
  """A meta file of 100,000 brackets, of nested configs, a folder, a pipe: no hang."""
  workdir, _ = run
  path = workdir / DIRECTORY / "2" / "meta" / "metadata"
  config = functools.reduce(lambda inner, _: {"a": inner}, range(300), 1)
  for text in ("[" * 100_000, pack_meta(read_meta(path.parents[1]) | {"config": config})):
    path.write_text(text)
    assert restore_params(workdir)[2]["step"] == 1
  path.unlink()
  for make in (os.mkfifo, os.mkdir):
    make(path)
    assert restore_params(workdir)[2]["step"] == 1
    path.unlink() if make is os.mkfifo else path.rmdir()


def test_what_may_not_be_read_is_an_error_and_no_damage(run, monkeypatch):
  """Permissions are the user's to mend: one line, nothing set aside."""
  workdir, states = run

  def refuse(path):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(files, "read_json", refuse)
  with pytest.raises(UserError, match="This user may not read .*metadata"):
    restore(workdir, states[1])
  assert (workdir / DIRECTORY / "2").exists()


def test_only_plain_numbers_are_steps(run):
  """A name that Python takes for a number and Orbax does not write is no step."""
  workdir, _ = run
  for name in ("007", "\u00b2", "\u0663", "-1", "9" * 30):
    (workdir / DIRECTORY / name).mkdir()
  assert list_steps(workdir / DIRECTORY) == [1, 2]


def test_a_swapped_or_missing_expert_is_named(tmp_path):
  """Valid files with two experts exchanged, or one zeroed: layer and expert named."""
  states = helpers.save_steps(tmp_path, [1, 2])
  good = read_meta(tmp_path / DIRECTORY / "2")

  def replaced(change):
    """Writes step 2 again with other parameters under the checksums of the right ones."""
    state = dict(states[2])
    experts = np.array(state["params"]["moe"]["w_in"])
    change(experts)
    moe = {"w_in": jnp.asarray(experts)}
    state["params"] = state["params"] | {"moe": moe}
    checkpoints = helpers.open_checkpoints(tmp_path)
    checkpoints.save(2, state, position={}, force=True)
    checkpoints.close()
    (tmp_path / DIRECTORY / "2" / "meta" / "metadata").write_text(pack_meta(good))

  def swap(experts):
    experts[1, [0, 2]] = experts[1, [2, 0]]

  def clear(experts):
    experts[0, 3] = 0

  replaced(swap)
  _, meta, said = restore(tmp_path, states[1])
  assert meta["step"] == 1
  assert "expert 0 of layer 1 holds what was expert 2 of layer 1" in said[0]
  replaced(clear)
  _, _, said = restore(tmp_path, states[1])
  assert "params.moe.w_in changed: expert 3 of layer 0 is missing" in said[0]
  assert (tmp_path / DIRECTORY / "2.damaged.1").exists()


def test_all_damaged_is_one_clear_error_and_nothing_is_renamed(run):
  """If none is whole the user decides: names and reasons, files where they were."""
  workdir, states = run
  for step in (1, 2):
    (workdir / DIRECTORY / str(step) / "meta" / "metadata").unlink()
  with pytest.raises(UserError, match=r"no intact checkpoint \(step 2: .*step 1:"):
    restore(workdir, states[1])
  assert sorted(p.name for p in (workdir / DIRECTORY).iterdir()) == ["1", "2"]
  with pytest.raises(UserError, match="no intact checkpoint"):
    restore_params(workdir)


def test_a_reader_passes_over_damage_without_renaming(run):
  """Evaluation uses the one before; an explicit --step is refused instead."""
  workdir, states = run
  (workdir / DIRECTORY / "2" / "state" / "_METADATA").write_text("{")
  params, _, meta = restore_params(workdir)
  assert meta["step"] == 1
  helpers.assert_identical(params, states[1]["params"])
  assert (workdir / DIRECTORY / "2").exists()
  with pytest.raises(UserError, match="step 2: its arrays cannot be read"):
    restore_params(workdir, 2)


def test_a_step_set_aside_can_be_saved_again(run):
  """The resumed run reaches the damaged step once more and saves it."""
  workdir, states = run
  (workdir / DIRECTORY / "2" / "meta" / "metadata").unlink()
  checkpoints = helpers.open_checkpoints(workdir, warn=lambda _: None)
  checkpoints.restore(helpers.shapes(states[1]))
  assert checkpoints.save(2, states[2], position={})
  checkpoints.close()
  assert checkpoints.steps() == [1, 2]
  restored, _, said = restore(workdir, states[2])
  helpers.assert_identical(restored, states[2])
  assert not said


def test_a_failing_write_does_not_end_the_run(tmp_path, monkeypatch):
  """The save fails in the background: said, cleared, and the next one succeeds."""
  said = []
  checkpoints = helpers.open_checkpoints(tmp_path, keep_last=1, warn=said.append)
  state = helpers.make_state()
  checkpoints.save(1, state, position={})
  assert checkpoints.wait()

  def full(meta):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint_orbax, "pack_meta", full)
    assert checkpoints.save(2, state, position={}, metric=0.1)
    assert not checkpoints.wait()
  assert checkpoints.failures == [(2, "the disk is full")]
  assert "step 2 could not be saved" in said[0] and "the disk is full" in said[0]
  assert "the run continues; the last good checkpoint is step 1" in said[0]
  assert [p.name for p in (tmp_path / DIRECTORY).iterdir()] == ["1"]
  assert checkpoints.save(3, state, position={}) and checkpoints.close()
  assert checkpoints.steps() == [3]


_LIMITED = """
import resource, signal, sys
import jax, jax.numpy as jnp
from pathlib import Path
from moejax.config import Config
from moejax.checkpoint.manager import Checkpointer

checkpoints = Checkpointer(
  Path(sys.argv[1]) / "checkpoints", keep_last=2, keep_best=0, config=Config(),
  metadata={}, warn=lambda m: print(m, flush=True))
small = {"params": {"w": jnp.arange(100.0)}}
large = {"params": {"w": jax.random.normal(jax.random.key(0), (400_000,))}}
checkpoints.save(1, small, position={})
print("first", checkpoints.wait(), flush=True)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if sys.argv[2] == "limit":
  hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
checkpoints.save(2, large, position={})
print("second", checkpoints.wait(), flush=True)
checkpoints.save(3, small, position={})
print("third", checkpoints.close(), checkpoints.steps(), flush=True)
"""


def _run_limited(workdir, how):
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, "-c", _LIMITED, str(workdir), how],
    capture_output=True,
    text=True,
    env=environment,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert "Traceback" not in done.stderr and "never" not in done.stderr, done.stderr
  names = sorted(p.name for p in (workdir / DIRECTORY).iterdir())
  return done.stdout.splitlines(), names


def test_the_run_goes_on_when_the_file_system_refuses(tmp_path):
  """A real refusal by the kernel (a file size limit, which needs no privileges)."""
  lines, names = _run_limited(tmp_path, "limit")
  assert lines[0] == "first True" and lines[2] == "second False"
  assert "step 2 could not be saved" in lines[1]
  assert "the run continues; the last good checkpoint is step 1" in lines[1]
  assert lines[3] == "third True [1, 3]" and names == ["1", "3"]


def test_the_run_goes_on_on_a_full_disk(tmp_path):
  """On a file system of one megabyte, where one can be mounted."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
  try:
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
  except FileNotFoundError:
    mounted = False
  # Unprivileged, the same run under a limit: the message is the same but for the reason.
  try:
    lines, names = _run_limited(disk, "full" if mounted else "limit")
  finally:
    if mounted:
      subprocess.run(["umount", "-l", str(disk)], check=True)
  assert lines[2:] == ["second False", "third True [1, 3]"] and names == ["1", "3"]
  assert ("the disk is full" in lines[1]) == mounted


def test_meta_round_trips_whatever_json_holds(tmp_path):
  """Floats, nested lists, unicode: the checksum is of what a reader computes again."""
  meta = {"format": 1, "step": 1, "config": {}, "leaves": {}}
  meta |= {"x": [1.1, 1e300, -0.0], "é": {"b": None, "a": [True]}}
  path = tmp_path / "1" / "meta" / "metadata"
  path.parent.mkdir(parents=True)
  path.write_text(pack_meta(meta))
  assert read_meta(tmp_path / "1") == meta
  assert json.loads(path.read_text())["meta"] == meta


@pytest.mark.parametrize("removed", [False, True])
def test_a_directory_that_goes_during_a_save_is_no_bug(
  tmp_path, monkeypatch, caplog, removed
):
  """Orbax then misses a file of its own; without a removal the same error is a bug."""
  said = []
  checkpoints = helpers.open_checkpoints(tmp_path, warn=said.append)

  def fail(meta):
    if removed:
      (tmp_path / DIRECTORY).rename(tmp_path / "away")
    raise ValueError("No ArrayMetadata found")

  monkeypatch.setattr(checkpoint_orbax, "pack_meta", fail)
  checkpoints.save(1, helpers.make_state(), position={})
  assert not checkpoints.wait()
  why = "its directory was removed" if removed else "No ArrayMetadata found"
  assert f"({why})" in said[0]
  assert any("Unexpected" in r.getMessage() for r in caplog.records) != removed
