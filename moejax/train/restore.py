"""Finds the checkpoint that a run continues from: its own newest or this machine's."""

import jax

from moejax.checkpoint import manager as checkpoint
from moejax.checkpoint.emergency import EmergencyCheckpoints
from moejax.config import MoEConfig
from moejax.errors import ConfigError, UserError
from moejax.train.state import State


def newest(
  checkpointer: checkpoint.Checkpointer,
  local: EmergencyCheckpoints | None,
  target: State,
  moe: MoEConfig,
) -> State | None:
  """Restores the newest intact checkpoint of either kind. Every process calls it.

  Args:
    checkpointer: of the run's directory.
    local: emergency checkpoints, if the user wants any.
    target: shapes and shardings.
    moe: of the run.

  Returns:
    The state; None if there is no checkpoint.

  Raises:
    ConfigError, UserError: the run's own cannot be used, and there is no local one.
  """
  step = checkpointer.latest()
  if local is not None and (found := local.restore(target, step)) is not None:
    return found
  if step is None:
    return None
  try:
    state, meta = checkpointer.restore(target)
  except ConfigError:
    raise
  except UserError:  # None of them is intact.
    if local is None or (found := local.restore(target)) is None:
      raise
    return found
  if problem := checkpoint.damaged_table(state["params"], moe):
    raise UserError(f"{checkpointer.directory}: {problem}, in another --workdir.")
  if local is not None and meta["step"] < step:
    # The newest were damaged, and a local one may lie between.
    found = local.restore(target, meta["step"])
    if found is not None:
      jax.tree.map(lambda array: array.delete(), state)
      return found
  return state
