"""The loss of a model on a batch, as sums over its valid tokens.

Shared by training, validation and evaluation.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

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


def to_devices(batch: Mapping[str, Any], mesh: Mesh) -> Batch:
  """Puts this process's rows of a batch on the devices, sharded for the compiled steps.

  The domain, which no model reads, stays on the host.
  """
  return {
    "inputs": rules.place_rows(mesh, batch["inputs"]),
    "targets": rules.place_rows(mesh, batch["targets"]),
    "segment_ids": rules.place_rows(mesh, batch["segment_ids"]),
    "positions": rules.place_rows(mesh, batch["positions"]),
  }


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
  """Their number."""
  bytes: Float[Array, ""]
  """Of the targets' text; 0 if unknown."""
  aux: dict[str, Float[Array, ""]]
  """Aux terms, unweighted."""
  stats: RouterStats | None
  """With a leading axis of MoE layers; None without any."""


def token_losses(
  model: Any, params: Params, batch: Batch, **kwargs: Any
) -> tuple[Float[Array, "B S"], DecoderOutput]:
  """Runs the model; returns each token's cross-entropy, 0 on padding, and its output."""
  out = model(
    params,
    batch["inputs"],
    segment_ids=batch["segment_ids"],
    positions=batch["positions"],
    **kwargs,
  )
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
