"""A preemption notice to one process stops all of them after the same step.

jax's coordination service listens for SIGTERM, with which Slurm, Kubernetes and the
system of a TPU VM announce that a machine will be taken away. It notifies the other
processes in the background, and they agree on the step after the furthest one. Checking
it at each step costs no communication.

It is on by default in `jax.distributed.initialize`; if it is off
(JAX_ENABLE_PREEMPTION_SERVICE=false), processes agree at some steps only.
"""

import jax
from jax.experimental import multihost_utils


class Notice:
  """Whether all processes must stop now; every process checks it after each step."""

  def __init__(self) -> None:
    # Counted from the start of the process: the service begins at 0, whatever the step.
    self._asked = 0

  def reached(self) -> bool:
    """Returns whether to stop here; the same call returns the same on all processes."""
    self._asked += 1
    return multihost_utils.reached_preemption_sync_point(self._asked)


def notice() -> Notice | None:
  """Returns the notice to check; None for a single process, or without the service."""
  if jax.process_count() == 1:
    return None
  try:
    multihost_utils.reached_preemption_sync_point(0)
  except RuntimeError:
    return None
  return Notice()
