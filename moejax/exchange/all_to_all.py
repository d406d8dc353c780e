"""Slots out to their experts' devices and back, by two all-to-alls of known shape.

Carries the layouts whose rows are slots: those filled by index, and dense mixtures. Under
recomputation the gate of a slot that holds one token travels with it, and outputs come
back weighted. The backward pass then needs no outputs, so none are computed or sent
again. Runs inside a `jax.shard_map`.

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
from moejax.experts.weights import ExpertWeights, apply_in_chunks
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
  # Without recomputation, gates would only store the hidden activations a second time.
  gates = slots.gates() if options.recomputed else None
  devices, width = jax.lax.axis_size(AXIS), x.shape[-1]
  local = rows.shape[0] // devices

  def experts(
    piece: Float[Array, "P L n D"], gate: Float[Array, "P L n"] | None
  ) -> Float[Array, "P L n D"]:
    received = _received(piece).swapaxes(0, 1)
    flat = received.reshape(local, -1, width)
    if gate is not None:
      gate = _received(gate).swapaxes(0, 1).reshape(local, -1)
    chunks, activation = options.expert_chunks, options.activation
    out = apply_in_chunks(flat, weights, activation, gate=gate, chunks=chunks)
    back = _exchanged(out.reshape(received.shape).swapaxes(0, 1))
    # Without gates the backward pass needs the outputs, to weight them.
    return back if gate is not None else checkpoint_name(back, SAVED_NAME)

  def pieces(array: Array) -> list[Array]:
    by_device = array.reshape(devices, local, -1, *array.shape[3:])
    return jnp.array_split(by_device, options.exchange_chunks, axis=2)

  sent = pieces(rows)
  gate_of = [None] * len(sent) if gates is None else pieces(gates)
  out = [experts(piece, gate) for piece, gate in zip(sent, gate_of, strict=True)]
  out = jnp.concatenate(out, axis=2).reshape(rows.shape)
  return slots.from_experts(out) if gates is None else slots.add_up(out), None


def _received(rows: Float[Array, "P L n *D"]) -> Float[Array, "P L n *D"]:
  """Returns the exchanged inputs of the experts, which a remat policy may save."""
  return checkpoint_name(_exchanged(rows), SAVED_NAME)


@parts.of_part(parts.EXCHANGE)
def _exchanged(rows: Float[Array, "P L n *D"]) -> Float[Array, "P L n *D"]:
  """Sends part d to device d; afterwards the first index is the sender."""
  return jax.lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=0, tiled=True)
