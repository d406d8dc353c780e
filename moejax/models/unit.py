"""Runs the repeats of a unit: rematerialised, in a scan or one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.exchange.base import SAVED_NAME

Unit = Callable[..., Any]
"""One repeat of the stack: (x, layer) -> (x, output), a body for `jax.lax.scan`."""


def remat(function: Unit, policy: str, *, in_scan: bool) -> Unit:
  """Applies `jax.checkpoint` to a unit under one of the `model.remat` policies."""
  match policy:
    case "none":
      return function
    case "all":
      return jax.checkpoint(function, prevent_cse=not in_scan)
    case "full":
      keep = jax.checkpoint_policies.save_only_these_names(SAVED_NAME)
      return jax.checkpoint(function, policy=keep, prevent_cse=not in_scan)
    case "offload":
      # What `full` saves, in the host's memory. XLA:CPU keeps it where it is.
      keep = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[SAVED_NAME],
        offload_src="device",
        offload_dst="pinned_host",
      )
      return jax.checkpoint(function, policy=keep, prevent_cse=not in_scan)
    case "dots":
      keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
      return jax.checkpoint(function, policy=keep, prevent_cse=not in_scan)
    case _:
      raise ValueError(
        f"--config.model.remat={policy!r} is not one of none, full, offload, all, dots"
      )


def unrolled(unit: Unit, x: Any, stacked: Any, repeats: int) -> Any:
  """Returns the same as `jax.lax.scan`, without a loop in the program."""
  outputs = []
  for index in range(repeats):
    x, output = unit(x, jax.tree.map(lambda leaf, i=index: leaf[i], stacked))
    outputs.append(output)
  return x, jax.tree.map(lambda *a: jnp.stack(a), *outputs)
