"""The placement of a model's parameters on a mesh."""

from typing import Any

from jax.sharding import Mesh

from moejax.sharding import rules


def param_shardings(model: Any, mesh: Mesh) -> Any:
  """Returns the sharding of each parameter, from the model's logical axes."""
  return rules.shardings(mesh, model.logical_axes(), model.shapes())
