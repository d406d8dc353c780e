"""A module, split into its structure and plain parameters."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from moejax.layers import parameter
from moejax.types import Params


class Shell:
  """A module's structure without its parameters."""

  def __init__(self, make: Callable[[Key[Array, ""]], Any]):
    self._make = make
    abstract = nnx.eval_shape(lambda: make(jax.random.key(0)))
    self._graphdef = nnx.graphdef(abstract)
    self.axes = parameter.logical_axes(abstract)
    self.trained = parameter.trained(abstract)
    self.shapes: Params = nnx.to_pure_dict(nnx.state(abstract))

  def init(self, key: Key[Array, ""]) -> Params:
    return nnx.to_pure_dict(nnx.state(self._make(key)))

  def merge(self, params: Params) -> Any:
    return nnx.merge(self._graphdef, params)
