"""Emergency checkpoints: the newest whole step of this run comes back, and no other."""

import errno
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.checkpoint import local_parts
from moejax.checkpoint.emergency import EmergencyCheckpoints
from moejax.config import Config
from moejax.errors import UserError
from moejax.run import emergency_dir, workdir
from tests.checkpoint.test_manager import assert_identical, make_mesh, make_state, shapes


def open_emergency(tmp_path: Path, *, said=None, config=None, metadata=None):
  run = tmp_path / "run"
  run.mkdir(exist_ok=True)
  return EmergencyCheckpoints(
    emergency_dir.Wish(directory=str(tmp_path / "local"), every=5),
    workdir=run,
    config=config or Config(),
    metadata={"dataset_fingerprint": "abc"} if metadata is None else metadata,
    warn=pytest.fail if said is None else said.append,
  )


def save_steps(tmp_path: Path, *steps: int):
  """Saves one state per step; returns them by step."""
  checkpoints = open_emergency(tmp_path)
  states = {step: make_state(seed=step) for step in steps}
  for step, state in states.items():
    checkpoints.save(step, state, {"step": step})
    assert checkpoints.wait()
  return states


def names(tmp_path: Path) -> list[str]:
  [own] = (tmp_path / "local").glob("run-*/process_0")
  return sorted(path.name for path in own.iterdir())


def step_path(tmp_path: Path, step: int) -> Path:
  [found] = (tmp_path / "local").glob(f"run-*/process_0/{step}")
  return found


def test_the_newest_step_comes_back_bit_for_bit_on_another_mesh(tmp_path):
  """Keys, bfloat16, masks and empty states; from 4x2 devices onto 2x4; two are kept."""
  checkpoints = open_emergency(tmp_path)
  for step in (5, 10, 15):
    state = make_state(seed=step, mesh=make_mesh((4, 2)))
    checkpoints.save(step, state, {"step": step})
  assert checkpoints.wait()
  assert names(tmp_path) == ["10", "15"]
  target = shapes(state, make_mesh((2, 4)))
  restored = open_emergency(tmp_path).restore(target)
  assert restored is not None
  assert_identical(restored, state)
  for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(target)):
    assert got.sharding == want.sharding


def test_a_step_that_the_run_s_directory_has_too_is_not_read(tmp_path):
  """Only what is newer than the run's own checkpoint."""
  states = save_steps(tmp_path, 5, 10)
  checkpoints = open_emergency(tmp_path)
  target = shapes(states[5])
  assert checkpoints.restore(target, newer_than=10) is None
  assert_identical(checkpoints.restore(target, newer_than=9), states[10])


def flip(path: Path) -> None:
  bits = np.load(path)
  bits.reshape(-1)[-1] ^= 1
  np.save(path, bits)


@pytest.mark.parametrize(
  "damage",
  [
    lambda step: flip(step / "3.npy"),
    lambda step: (step / "3.npy").write_bytes((step / "3.npy").read_bytes()[:-1]),
    lambda step: (step / "3.npy").unlink(),
    lambda step: (step / "meta" / "metadata").write_text("{"),
    lambda step: (step / "meta" / "metadata").unlink(),
  ],
  ids=["a flipped bit", "a short file", "no file", "a torn meta", "no meta"],
)
def test_a_damaged_step_is_passed_over_with_one_line(tmp_path, damage):
  """The one before it is used, and nothing raises."""
  states = save_steps(tmp_path, 5, 10)
  damage(step_path(tmp_path, 10))
  said = []
  restored = open_emergency(tmp_path, said=said).restore(shapes(states[5]))
  assert_identical(restored, states[5])
  assert len(said) == 1 and "/10 is skipped: " in said[0]


def test_what_a_killed_save_left_is_no_step_and_goes(tmp_path):
  """A step has its number as a name only when it is whole."""
  states = save_steps(tmp_path, 5)
  step = step_path(tmp_path, 5)
  step.rename(step.with_name(".10.0123456789abcdef"))
  checkpoints = open_emergency(tmp_path)
  assert names(tmp_path) == []
  assert checkpoints.restore(shapes(states[5])) is None


def test_steps_of_another_run_config_or_text_are_never_restored(tmp_path):
  """The same directory of another run, as after `rm -r`: one line, and a fresh start."""
  states = save_steps(tmp_path, 5, 10)
  target = shapes(states[5])
  said = []

  def refused(words: str, **changed) -> None:
    said.clear()
    assert open_emergency(tmp_path, said=said, **changed).restore(target) is None
    assert len(said) == 1 and words in said[0]

  other = Config()
  other.optimizer.learning_rate = 0.5
  refused("--config.optimizer.learning_rate was", config=other)
  refused("its dataset fingerprint differs", metadata={"dataset_fingerprint": "x"})
  other = Config()
  other.train.checkpoint_every += 1  # May change when a run resumes.
  assert open_emergency(tmp_path, config=other).restore(target) is not None
  (tmp_path / "run" / workdir.RUN_FILE).unlink()
  refused("and 1 more is skipped: it belongs to another run")


def test_a_disk_that_is_full_is_reported_once_and_the_run_goes_on(tmp_path, monkeypatch):
  """Nothing half-written stays; the next save that succeeds is a checkpoint."""
  said = []
  checkpoints = open_emergency(tmp_path, said=said)
  state = make_state()

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(np, "save", full)
    for step in (5, 10):
      checkpoints.save(step, state, {"step": step})
      assert not checkpoints.wait()
  assert names(tmp_path) == []
  assert len(said) == 1 and "the disk is full" in said[0] and "step 5" in said[0]
  assert [step for step, _ in checkpoints.failures] == [5, 10]
  checkpoints.save(15, state, {"step": 15})
  assert checkpoints.wait()
  assert_identical(checkpoints.restore(shapes(state)), state)


def test_a_run_that_is_done_leaves_nothing(tmp_path):
  """Its checkpoints in --workdir are all that is needed."""
  save_steps(tmp_path, 5)
  open_emergency(tmp_path).clear()
  assert list((tmp_path / "local").iterdir()) == []


def test_a_run_has_begun_with_its_first_emergency_checkpoint(tmp_path):
  """Before a checkpoint or a logged step: the id that it is known by must stay."""
  config, run = Config(), tmp_path / "run"
  config.train.num_steps = 7
  workdir.prepare(run, config, "abc")
  assert isinstance(workdir.prepare(run, config, "abc"), workdir.New)
  save_steps(tmp_path, 5)
  before = json.loads((run / workdir.RUN_FILE).read_text())
  assert isinstance(workdir.prepare(run, config, "abc"), workdir.Resume)
  assert json.loads((run / workdir.RUN_FILE).read_text()) == before
  workdir.release(run)


def test_parts_of_any_cut_make_any_region(tmp_path):
  """An array in blocks of uneven size, against numpy's own slices."""
  array = np.arange(6 * 7, dtype=np.uint32).reshape(6, 7)
  parts = [
    ([[a, b], [c, d]], array[a:b, c:d])
    for a, b in ((0, 1), (1, 4), (4, 6))
    for c, d in ((0, 5), (5, 7))
  ]
  entries = local_parts.store(tmp_path, parts, 0)
  stored = [(tmp_path, entry) for entry in entries]

  def load(path, entry):
    return np.load(path / entry["file"])

  for rows in ([0, 6], [2, 5], [3, 4]):
    for columns in ([0, 7], [4, 6], [0, 5]):
      found = local_parts._region("w", [rows, columns], stored, load)
      np.testing.assert_array_equal(found, array[slice(*rows), slice(*columns)])
  with pytest.raises(local_parts.DamagedCheckpointError, match="part of w is not on"):
    local_parts._region("w", [[0, 6], [0, 7]], stored[:-1], load)


@pytest.mark.parametrize(
  ("directory", "words"),
  [
    ("gs://bucket/local", "is not on a disk of this machine"),
    ("s3://bucket/local", "is not on a disk of this machine"),
    ("{root}/run", "lies in it"),
    ("{root}/run/local", "lies in it"),
    ("{root}/file", "cannot be written to"),
    ("/proc/local", "cannot be written to"),
  ],
)
def test_a_directory_that_cannot_serve_is_refused(tmp_path, directory, words):
  """One line that names the flag, and nothing is made."""
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match=words) as refused:
    emergency_dir.check(directory.format(root=tmp_path), tmp_path / "run")
  assert "--emergency_local_dir=" in str(refused.value)
  assert [path.name for path in tmp_path.iterdir()] == ["file"]
