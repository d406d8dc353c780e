"""A notice of preemption to one process stops all of them at the same next step.

jax's coordination service listens for SIGTERM, which is how Slurm, Kubernetes and a
TPU VM's system announce that a machine will be taken away. It tells the other processes
in the background, and they agree on the step after the furthest one. Asking it at each
step costs no communication.

It is jax's default in `jax.distributed.initialize`; where it is off
(JAX_ENABLE_PREEMPTION_SERVICE=false), processes agree at some steps only.
"""

import jax
from jax.experimental import multihost_utils


class Notice:
  """Whether all processes are to stop now. Each of them asks after each step."""

  def __init__(self) -> None:
    # Counted from the start of the process: the service begins at 0, whatever the step.
    self._asked = 0

  def reached(self) -> bool:
    """Returns whether to stop here: the same on all processes, at the same call."""
    self._asked += 1
    return multihost_utils.reached_preemption_sync_point(self._asked)


def notice() -> Notice | None:
  """Returns the notice to ask; None for a single process, or without the service."""
  if jax.process_count() == 1:
    return None
  try:
    multihost_utils.reached_preemption_sync_point(0)
  except RuntimeError:
    return None
  return Notice()
