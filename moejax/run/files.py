"""Names of what a run keeps, and which of its checkpoints are whole."""

import re
from pathlib import Path

CONFIG_FILE = "config.json"
"""A run's resolved config; a directory without one is no run's."""

DIRECTORY = "checkpoints"
"""Where a workdir keeps its steps."""


_STEP = re.compile("0|[1-9][0-9]{0,17}")


def list_steps(directory: Path) -> list[int]:
  """The steps that were completely written, ascending.

  A save is written beside and renamed when complete, so a number is complete;
  what a killed process left has a longer name.
  """
  if not directory.is_dir():
    return []
  # "007" and digits of other scripts are nobody's steps.
  return sorted(int(p.name) for p in directory.iterdir() if _STEP.fullmatch(p.name))
