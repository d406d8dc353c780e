"""Training runs started by a study, each in its own process."""

import sys
from typing import Any

from absl import flags

from moejax.cli import flags as cli


def train_command(workdir: Any, *settings: str) -> list[str]:
  """The command of one run: this command line's config and overrides, and `settings`.

  Args:
    workdir: of the run.
    *settings: such as `moe.router=hash`; they win over the command line.
  """
  given = (f"{name}={cli.spelled(value)}" for name, value in cli.overrides().items())
  return [
    *(sys.executable, "-m", "experiments.train"),
    *(f"--config={flags.FLAGS.config}", f"--workdir={workdir}"),
    *(f"--config.{setting}" for setting in (*given, *settings)),
  ]
