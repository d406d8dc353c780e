"""The loss of a model on a batch, as sums over its valid tokens.

Shared by training, validation and evaluation.
"""

from collections.abc import Mapping
from typing import Any, TypedDict, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moejax import parts
from moejax.config import Config
from moejax.config.spans import target_length
from moejax.models.output import DecoderOutput
from moejax.routing.base import RouterStats
from moejax.sharding import rules
from moejax.types import Params, pytree


class Batch(TypedDict):
  """Rows of a batch on the devices."""

  inputs: Int[Array, "B S"]
  targets: Int[Array, "B S"]
  segment_ids: Int[Array, "B S"]
  """Documents of a row are 1, 2, ...; 0 is padding."""
  positions: Int[Array, "B S"]
  """Position of a token in its segment."""


class EncoderBatch(Batch):
  """Rows of a batch with inputs of an encoder; the keys of `Batch` are the decoder's."""

  encoder_inputs: Int[Array, "B M"]
  encoder_segment_ids: Int[Array, "B M"]
  """The decoder's segment that reads each token; 0 is padding."""
  encoder_positions: Int[Array, "B M"]


def batch_shapes(config: Config) -> dict[str, tuple[int, int]]:
  """Returns the shape of each array of a training batch."""
  decoder = (config.train.batch_size, target_length(config.data))
  shapes = dict.fromkeys(Batch.__annotations__, decoder)
  if config.model.kind == "encoder_decoder":
    encoder = (config.train.batch_size, config.data.sequence_length)
    shapes |= dict.fromkeys(EncoderBatch.__annotations__, encoder) | shapes
  return shapes


def to_devices(batch: Mapping[str, Any], mesh: Mesh) -> Batch:
  """Puts this process's rows of a batch on the devices, sharded for the compiled steps.

  The domain, which no model reads, stays on the host.
  """
  placed = {
    name: rules.put_rows(mesh, rows) for name, rows in batch.items() if name != "domain"
  }
  return cast(Batch, placed)


def cross_entropy(
  logits: Float[Array, "B S V"], targets: Int[Array, "B S"]
) -> Float[Array, "B S"]:
  """Returns the negative log-likelihood of each target, in nats, in float32."""
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen


@pytree
class Sums:
  """Sums over the valid tokens of one batch, or of several: they add up."""

  loss: Float[Array, ""]
  """Cross-entropy in nats, without aux terms."""
  tokens: Float[Array, ""]
  """Number of valid tokens."""
  bytes: Float[Array, ""]
  """Bytes of the targets' text; 0 if unknown."""
  aux: dict[str, Float[Array, ""]]
  """Aux terms, unweighted."""
  stats: RouterStats | None
  """Router statistics with a leading axis of MoE layers; None without any."""


def token_losses(
  model: Any, params: Params, batch: Batch, **kwargs: Any
) -> tuple[Float[Array, "B S"], DecoderOutput]:
  """Runs the model; returns each token's cross-entropy, 0 on padding, and its output."""
  if "encoder_inputs" in batch:
    kwargs["encoder_tokens"] = batch["encoder_inputs"]
    kwargs["encoder_segment_ids"] = batch["encoder_segment_ids"]
    kwargs["encoder_positions"] = batch["encoder_positions"]
  out = model(
    params,
    batch["inputs"],
    segment_ids=batch["segment_ids"],
    positions=batch["positions"],
    **kwargs,
  )
  with parts.scope(parts.LOSS):
    losses = cross_entropy(out.logits, batch["targets"])
    return jnp.where(batch["segment_ids"] > 0, losses, 0.0), out


def forward_sums(
  model: Any,
  params: Params,
  batch: Batch,
  *,
  token_bytes: Float[Array, "V"] | None = None,
  **kwargs: Any,
) -> Sums:
  """Runs the model and sums over the valid tokens of a batch.

  Args:
    model: a decoder (see `moejax.models.decoder`).
    params: its parameters.
    batch: arrays [B, S]; targets count where `segment_ids` > 0.
    token_bytes: bytes of text of each vocabulary id; None if unknown.
    **kwargs: passed to the model: key, train, capacity_factor, batch_chosen, present,
      step.
  """
  losses, out = token_losses(model, params, batch, **kwargs)
  valid = batch["segment_ids"] > 0
  num_bytes = jnp.zeros((), jnp.float32)
  if token_bytes is not None:
    num_bytes = jnp.sum(jnp.where(valid, token_bytes[batch["targets"]], 0.0))
  return Sums(
    loss=jnp.sum(losses),
    tokens=jnp.sum(valid, dtype=jnp.float32),
    bytes=num_bytes,
    aux=dict(out.aux),
    stats=out.stats,
  )
