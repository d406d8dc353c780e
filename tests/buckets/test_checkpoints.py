"""Checkpoints in a bucket: complete by a marker, and nothing lost on the way."""

import pytest

from moejax.checkpoint.manager import DIRECTORY
from moejax.checkpoint.params import restore_params
from moejax.errors import UserError
from moejax.run.files import list_partial, list_steps
from tests.checkpoint.test_manager import (
  assert_identical,
  open_checkpoints,
  save_steps,
  shapes,
)


def objects(root, folder, step):
  """The files of a checkpoint as the emulator keeps them."""
  bucket = root / "bucket" / folder.name / DIRECTORY / str(step)
  return [file for file in bucket.rglob("*") if file.is_file()]


def test_what_is_read_is_what_was_written_and_old_steps_go(folder):
  """Three saves, of which two are kept: the newest has the bits of its state."""
  states = save_steps(folder, [1, 2, 3], keep_last=2)
  assert list_steps(folder / DIRECTORY) == [2, 3]
  checkpoints = open_checkpoints(folder)
  state, meta = checkpoints.restore(shapes(states[3]))
  checkpoints.close()
  assert_identical(state, states[3])
  assert meta["step"] == 3
  params, _, meta = restore_params(folder, 2)
  assert_identical(params, states[2]["params"])


def test_a_save_without_its_marker_is_ignored_and_removed(folder):
  """What a killed process leaves: readers pass over it, the next run clears it."""
  states = save_steps(folder, [1, 2])
  (folder / DIRECTORY / "2" / "commit_success.txt").unlink()
  assert list_steps(folder / DIRECTORY) == [1]
  assert [p.name for p in list_partial(folder / DIRECTORY)] == ["2"]
  assert restore_params(folder)[2]["step"] == 1
  checkpoints = open_checkpoints(folder)
  assert not (folder / DIRECTORY / "2").exists()
  state, _ = checkpoints.restore(shapes(states[1]))
  assert_identical(state, states[1])
  assert checkpoints.save(2, states[2], position={"step": 2})
  checkpoints.close()
  assert list_steps(folder / DIRECTORY) == [1, 2]


def test_a_damaged_step_is_set_aside_and_the_one_before_is_used(folder, root):
  """An object changed behind the run's back; its copy stays for a closer look."""
  states = save_steps(folder, [1, 2])
  for file in objects(root, folder, 2):
    if "/d/" in file.as_posix():
      data = bytearray(file.read_bytes())
      data[len(data) // 2] ^= 1
      file.write_bytes(bytes(data))
  said = []
  checkpoints = open_checkpoints(folder, warn=said.append)
  state, _ = checkpoints.restore(shapes(states[1]))
  assert_identical(state, states[1])
  assert "damaged" in said[0] and "set aside as 2.damaged" in said[0]
  assert list_steps(folder / DIRECTORY) == [1]
  assert (folder / DIRECTORY / "2.damaged").is_dir()
  assert not (folder / DIRECTORY / "2").exists()
  assert checkpoints.save(2, states[2], position={"step": 2})
  checkpoints.close()
  assert list_steps(folder / DIRECTORY) == [1, 2]


def test_an_empty_folder_has_no_checkpoint(folder):
  """One line says what is there instead, as on a disk."""
  (folder / "notes.txt").write_text("x")
  with pytest.raises(UserError, match="has no checkpoint: it holds notes.txt"):
    restore_params(folder)
