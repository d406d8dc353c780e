"""A model run block by block, to stop, change and resume anywhere.

Each half of a block is one compiled function, shared by all repeats of the block, so
neither depth nor the number of restarts costs compile time. The layers below a change,
which it does not affect, are computed once.

Letters: B batch, S sequence, D width, E experts.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from moejax.layers.block import BlockInputs, CallOptions
from moejax.layers.moe import LayerInputs, MoE
from moejax.layers.routes import Routes
from moejax.models.decoder import Decoder
from moejax.models.loss import cross_entropy
from moejax.models.placement import param_shardings
from moejax.models.stack import LayerPath
from moejax.sharding import rules
from moejax.types import Params, pytree

Mask = Bool[Array | np.ndarray, "E"]


@pytree
class Removed:
  """The experts of one layer that are removed, and what happens to their tokens."""

  present: Mask | None = None
  """next_best: the experts that the router can choose; the others' logits are lowered as
  under expert dropout."""
  sounding: Mask | None = None
  """none: the experts whose output counts; that of the others is zero. Choices and gates
  stay."""


def silence(moe: MoE, sounding: Bool[Array, "E"]) -> None:
  """Makes the outputs of some experts exactly zero, in place."""
  for matrix in (moe.experts.w_out, moe.experts.out_bias):
    if matrix is not None:
      shape = (-1,) + (1,) * (matrix[...].ndim - 1)
      zero = jnp.zeros((), matrix[...].dtype)
      matrix[...] = jnp.where(sounding.reshape(shape), matrix[...], zero)


class Layerwise:
  """A decoder in evaluation, half a block at a time."""

  def __init__(
    self, model: Decoder, params: Params, mesh: Mesh, capacity_factor: float | None
  ):
    """Puts the parameters on the mesh; calls must be in the scope of that mesh."""
    self.model = model
    self.paths = model.stack.paths
    self._params = jax.device_put(params, param_shardings(model, mesh))
    self._options = CallOptions(
      train=False, capacity_factor=capacity_factor, return_routes=True
    )
    jit = functools.partial(jax.jit, static_argnames=("part", "name"))
    self._begin = jax.jit(self._begin_)
    self._attend, self._feed, self._read, self._normed = map(
      jit, (self._attend_, self._feed_, self._read_, self._normed_)
    )
    self._losses = jax.jit(self._losses_, out_shardings=rules.replicated(mesh))

  def begin(self, batch: Any) -> tuple[Float[Array, "B S D"], BlockInputs]:
    """Returns the first block's input, and the inputs shared by all blocks."""
    return self._begin(
      self._params, batch["inputs"], batch["segment_ids"], batch["positions"]
    )

  def attend(
    self, layer: int, x: Float[Array, "B S D"], inputs: BlockInputs
  ) -> Float[Array, "B S D"]:
    """Runs a block's attention."""
    return self._attend(self._params, x, inputs, **self._path(layer))

  def feed(
    self,
    layer: int,
    x: Float[Array, "B S D"],
    inputs: BlockInputs,
    removed: Removed | None = None,
  ) -> tuple[Float[Array, "B S D"], Routes | None]:
    """Runs a block's feed-forward, and returns the routes of an MoE layer."""
    removed = removed or Removed()
    return self._feed(self._params, x, inputs, removed, **self._path(layer))

  def read(
    self, layer: int, x: Float[Array, "B S D"], inputs: BlockInputs
  ) -> tuple[Float[Array, "B S D"], Any]:
    """Returns the input of an MoE layer, and its experts' weights."""
    return self._read(self._params, x, inputs, **self._path(layer))

  def normed(
    self, layer: int, x: Float[Array, "B S D"], inputs: BlockInputs
  ) -> Float[Array, "B S D"]:
    """Returns the input of a block's feed-forward, dense or MoE."""
    return self._normed(self._params, x, inputs, **self._path(layer))

  def losses(self, x: Float[Array, "B S D"], batch: Any) -> Float[Array, "B"]:
    """Returns the summed cross-entropy of each sequence, from the last block's output."""
    return self._losses(self._params, x, batch["targets"], batch["segment_ids"])

  def rest(
    self, layer: int, x: Float[Array, "B S D"], inputs: BlockInputs
  ) -> Float[Array, "B S D"]:
    """Runs all blocks after `layer`."""
    for later in range(layer + 1, len(self.paths)):
      x, _ = self.feed(later, self.attend(later, x, inputs), inputs)
    return x

  def to_moe_layers(
    self, x: Float[Array, "B S D"], inputs: BlockInputs
  ) -> Iterator[tuple[int, Float[Array, "B S D"], Float[Array, "B S D"], Routes]]:
    """Yields each MoE layer, the input and output of its feed-forward, and its routes."""
    for layer in range(self.model.moe_layers[-1] + 1):
      x = self.attend(layer, x, inputs)
      after, routes = self.feed(layer, x, inputs)
      if layer in self.model.moe_layers:
        assert routes is not None
        yield layer, x, after, routes
      x = after

  def _path(self, layer: int) -> dict[str, Any]:
    path = self.paths[layer]
    return {"part": path.part, "name": path.name, "repeat": path.repeat}

  def _begin_(self, params: Params, tokens: Any, segment_ids: Any, positions: Any) -> Any:
    x, inputs, _ = self.model.begin(
      *(params, tokens, self._options), segment_ids=segment_ids, positions=positions
    )
    return x, inputs

  def _attend_(self, params: Params, x: Any, inputs: Any, repeat: Any, **where: Any):
    block, own = self.model.stack.block(params, inputs, LayerPath(**where, repeat=repeat))
    return block.attend(x, own)[0]

  def _feed_(
    self, params: Params, x: Any, inputs: Any, removed: Removed, repeat: Any, **where: Any
  ) -> tuple[Float[Array, "B S D"], Routes | None]:
    block, own = self.model.stack.block(params, inputs, LayerPath(**where, repeat=repeat))
    if removed.sounding is not None:
      silence(block.moe, jnp.asarray(removed.sounding))
    present = None if removed.present is None else jnp.asarray(removed.present)
    x, aux = block.feed(x, own, layer=LayerInputs(present=present))
    return x, None if aux is None else aux.routes

  def _read_(self, params: Params, x: Any, inputs: Any, repeat: Any, **where: Any):
    block, _ = self.model.stack.block(params, inputs, LayerPath(**where, repeat=repeat))
    normed = block.normed(x)
    return normed, block.moe.experts.weights(normed.dtype)

  def _normed_(self, params: Params, x: Any, inputs: Any, repeat: Any, **where: Any):
    block, _ = self.model.stack.block(params, inputs, LayerPath(**where, repeat=repeat))
    return block.normed(x)

  def _losses_(self, params: Params, x: Any, targets: Any, segment_ids: Any):
    losses = cross_entropy(self.model.finish(params, x), targets)
    return jnp.sum(jnp.where(segment_ids > 0, losses, 0.0), axis=1)
