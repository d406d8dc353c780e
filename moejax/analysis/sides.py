"""One stack of an encoder-decoder at a time: the model that measures use, and its rows.

An encoder-decoder routes two texts: the encoder's and the decoder's. A `Side` is one of
its stacks, as a model with its own text. Its layers are named `encoder.1`, `decoder.3`,
with their numbers in the stack.

Letters: L MoE layers of the stack, B batch, S decoder's sequence, M encoder's sequence.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.config import ModelConfig, MoEConfig
from moejax.config.pattern import Pattern
from moejax.layers.routes import Routes
from moejax.models.decoder import Decoder
from moejax.models.output import DecoderOutput
from moejax.models.stack import Stack
from moejax.routing.router import Router
from moejax.types import Params

ENCODER, DECODER = "encoder", "decoder"


@runtime_checkable
class Routing(Protocol):
  """The interface of measures to a model: a `Decoder`, or a `Side`."""

  @property
  def vocab_size(self) -> int: ...
  @property
  def config(self) -> ModelConfig: ...
  @property
  def moe(self) -> MoEConfig: ...
  @property
  def router(self) -> Router: ...
  @property
  def pattern(self) -> Pattern: ...
  @property
  def moe_layers(self) -> tuple[Any, ...]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
  """A stack of an encoder-decoder."""

  name: str
  """`encoder` or `decoder`, which is also the name of its parameters."""
  stack: Stack
  vocab_size: int

  @property
  def config(self) -> ModelConfig:
    return self.stack.config

  @property
  def moe(self) -> MoEConfig:
    return self.stack.moe

  @property
  def router(self) -> Router:
    return self.stack.router

  @property
  def pattern(self) -> Pattern:
    return self.stack.pattern

  @property
  def moe_layers(self) -> tuple[str, ...]:
    """Names of the MoE layers, in order."""
    return tuple(f"{self.name}.{layer}" for layer in self.stack.moe_layers)


def sides(model: Decoder) -> list[Side]:
  """Returns the stacks with MoE layers, the encoder first; none for a decoder."""
  return [
    Side(name=name, stack=stack, vocab_size=model.vocab_size)
    for name, stack in model.stacks.items()
    if name and stack.moe_layers
  ]


def params_of(side: Side | None, params: Params) -> Params:
  """Returns the parameters with those of the side at the top level, as in a decoder."""
  return params if side is None else {**params, **params[side.name]}


def routes_of(side: Side | None, out: DecoderOutput) -> Routes:
  """Returns the decisions of the side's routers, from a call with `return_routes`."""
  is_encoder = side is not None and side.name == ENCODER
  routes = out.encoder_routes if is_encoder else out.routes
  assert routes is not None
  return routes


def rows_of(side: Side | None, batch: Any) -> Any:
  """Returns the tokens that the side reads, under the names of a decoder's batch.

  An encoder predicts nothing, so its rows have no `targets`. The domain of its tokens is
  that of the decoder's segment that reads them.
  """
  if side is None or side.name != ENCODER:
    return batch
  segments = batch["encoder_segment_ids"]
  return {
    "inputs": batch["encoder_inputs"],
    "segment_ids": segments,
    "positions": batch["encoder_positions"],
    "domain": _domain(segments, batch["segment_ids"], batch["domain"]),
  }


def _domain(
  of: Int[Array, "B M"], segments: Int[Array, "B S"], domain: Int[Array, "B S"]
) -> Int[Array, "B M"]:
  same = of[:, :, None] == segments[:, None, :]
  return jnp.max(jnp.where(same, domain[:, None, :], 0), axis=-1)
