"""Slots out to their experts' devices and back, by two all-to-alls of known shape.

Carries the layouts whose rows are slots: those filled by index, and dense mixtures. Runs
inside a `jax.shard_map`.

Letters: G groups of this device, T tokens of a group, D width, E experts, P devices of
the expert axis, L = E/P local experts, C slots per expert and group.
Source: GShard, arXiv:2006.16668, section 3.3.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moejax import parts
from moejax.dispatch.base import Layout, SlotLayout
from moejax.exchange.base import AXIS, SAVED_NAME, Options
from moejax.experts.weights import ExpertWeights, apply_experts
from moejax.routing.placement import Placement


def all_to_all(
  x: Float[Array, "G T D"],
  placement: Placement,
  layout: type[Layout],
  weights: ExpertWeights,
  options: Options,
) -> tuple[Float[Array, "G T D"], None]:
  """Sends slots [E, G*C] split by expert, runs the experts, and sends them back."""
  assert issubclass(layout, SlotLayout), layout
  slots = layout.of(placement)
  rows = slots.to_experts(x)
  devices, width = jax.lax.axis_size(AXIS), x.shape[-1]
  local = rows.shape[0] // devices

  def experts(piece: Float[Array, "P L n D"]) -> Float[Array, "P L n D"]:
    received = _exchanged(piece).swapaxes(0, 1)
    flat = received.reshape(local, -1, width)
    out = apply_experts(flat, weights, options.activation).reshape(received.shape)
    return _exchanged(out.swapaxes(0, 1))

  by_device = rows.reshape(devices, local, -1, width)
  pieces = jnp.array_split(by_device, options.exchange_chunks, axis=2)
  out = jnp.concatenate([experts(piece) for piece in pieces], axis=2)
  return slots.from_experts(out.reshape(rows.shape)), None


@parts.of_part(parts.EXCHANGE)
def _exchanged(rows: Float[Array, "P L n D"]) -> Float[Array, "P L n D"]:
  """Part d goes to device d; afterwards the first index is the sender."""
  rows = jax.lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=0, tiled=True)
  return checkpoint_name(rows, SAVED_NAME)
