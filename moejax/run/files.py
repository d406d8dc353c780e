"""Names of a run's files, and which of its checkpoints are complete."""

import contextlib
import re

from moejax.storage.paths import RunPath, in_bucket

CONFIG_FILE = "config.json"
"""A run's resolved config; a directory without one belongs to no run."""

DIRECTORY = "checkpoints"
"""Name of the folder of checkpoints in a workdir."""


_PARTIAL = "*.orbax-checkpoint-tmp*"
"""Name pattern of an incomplete save on a disk."""

_COMMITTED = "commit_success.txt"
"""The file that Orbax writes last into a checkpoint in a bucket."""

_STEP = re.compile("0|[1-9][0-9]{0,17}")


def _numbered(directory: RunPath) -> list[RunPath]:
  """Returns the entries named like a step; "007" and non-ASCII digits do not count."""
  return [p for p in directory.iterdir() if _STEP.fullmatch(p.name)]


def list_steps(directory: RunPath) -> list[int]:
  """Returns the steps with a complete checkpoint, ascending.

  A save is renamed to its number only when it is complete; one that a killed process left
  behind has a longer name. In a bucket, which cannot rename, a marker completes a save.
  """
  if not directory.is_dir():
    return []
  numbered = _numbered(directory)
  if in_bucket(directory):
    numbered = [p for p in numbered if (p / _COMMITTED).exists()]
  return sorted(int(p.name) for p in numbered)


def list_partial(directory: RunPath) -> list[RunPath]:
  """Returns what unfinished saves left behind, and in a bucket unfinished removals."""
  if not in_bucket(directory):
    return list(directory.glob(_PARTIAL))
  if not directory.is_dir():
    return []
  return [p for p in _numbered(directory) if not (p / _COMMITTED).exists()]


def uncommit(step_directory: RunPath) -> None:
  """Makes a checkpoint in a bucket incomplete at once, before its many objects move."""
  # A request that is repeated because its answer was lost finds nothing to remove.
  with contextlib.suppress(FileNotFoundError):
    (step_directory / _COMMITTED).unlink()
