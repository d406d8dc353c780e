"""Several processes, one program: the seam where a run joins the others.

A launcher says who is who in the environment, as `jax.distributed.initialize`
reads it: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import os

import jax

from moejax.errors import UserError

_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_REST = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
  """Joins the other processes if the environment names a coordinator.

  To be called once, before the first array is made.

  Raises:
    UserError: the environment names a coordinator and not this process's place.
  """
  address = os.environ.get(_ADDRESS)
  if not address:
    return
  missing = [name for name in _REST if not os.environ.get(name, "").isdigit()]
  if missing:
    raise UserError(
      f"{_ADDRESS}={address} is set and {' and '.join(missing)} not: set all three, or "
      "none for a single process."
    )
  count, index = (int(os.environ[name]) for name in _REST)
  jax.distributed.initialize(address, num_processes=count, process_id=index)
