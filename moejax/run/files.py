"""Names of a run's files, and which of its checkpoints are complete."""

import re
from pathlib import Path

CONFIG_FILE = "config.json"
"""A run's resolved config; a directory without one belongs to no run."""

DIRECTORY = "checkpoints"
"""Where a workdir keeps its checkpoints."""


_STEP = re.compile("0|[1-9][0-9]{0,17}")


def list_steps(directory: Path) -> list[int]:
  """Returns the steps with a complete checkpoint, ascending.

  A save gets its number as a name only when it is complete; what a killed process
  leaves has a longer name.
  """
  if not directory.is_dir():
    return []
  # "007" and non-ASCII digits are not steps.
  return sorted(int(p.name) for p in directory.iterdir() if _STEP.fullmatch(p.name))
