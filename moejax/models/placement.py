"""The placement of a model's parameters on a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh

from moejax.errors import ConfigError
from moejax.models.trained import Rows
from moejax.sharding import rules


def param_shardings(model: Any, mesh: Mesh) -> Any:
  """Returns the sharding of each parameter, from the model's logical axes."""
  return rules.shardings(mesh, model.logical_axes(), model.shapes())


def check_rows(model: Any, mesh: Mesh) -> None:
  """Rejects a model with frozen experts if a mesh cannot divide the others evenly.

  The optimizer's moments of the trained experts are sharded like experts, so each device
  must hold equally many.

  Raises:
    ConfigError: names the parameter, the numbers and the axis.
  """
  mask, axes = model.trained(), model.logical_axes()

  def one(path: Any, entry: Any, names: rules.LogicalAxes) -> None:
    if not isinstance(entry, Rows):
      return
    axis, trained = rules.RULES.spec(names)[entry.axis], sum(entry.trained)
    if axis is not None and trained % mesh.shape[axis]:
      raise ConfigError(
        f"--config.train.frozen leaves {trained} of {len(entry.trained)} experts of "
        f"{jax.tree_util.keystr(path, simple=True, separator='.')} to be trained, but "
        f"--config.mesh.{axis}={mesh.shape[axis]} cannot share them out evenly. Freeze "
        f"another number of experts, or choose a divisor of {trained}."
      )

  jax.tree_util.tree_map_with_path(one, mask, axes)
