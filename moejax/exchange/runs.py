"""Runs of rows of any length, sent to the devices of their experts and back.

Runs inside a `jax.shard_map`. Every device has rows sorted by expert; device d of the
expert axis holds experts d*E/P to (d+1)*E/P - 1, so it receives one run of each
device's rows. All devices gather all run lengths (P*E integers) and compute every
offset from them, so that sizes need no second exchange, and sender and receiver agree
on what does not fit a bounded buffer.

`jax.lax.ragged_all_to_all` moves the rows on GPU and TPU. XLA:CPU lacks it; there the
same offsets select the rows from an all-gather.

Letters: P devices of the expert axis, s sender, d receiver, E experts, L = E/P local
experts, A rows of one device to send, R rows of its receive buffer, D width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax import parts
from moejax.platform import target_platform
from moejax.types import pytree, static_field


@pytree
class Offsets:
  """The sends and receives of one device."""

  axis: str = static_field()
  num_rows: int = static_field()
  """A."""
  num_received: int = static_field()
  """R."""
  send_start: Int[Array, "P"]
  """Where the run for each receiver begins among this device's rows."""
  send_size: Int[Array, "P"]
  """Rows of each run that fit the receiver's buffer."""
  send_target: Int[Array, "P"]
  """Where the run goes in the receiver's buffer."""
  receive_start: Int[Array, "P"]
  """Where each sender's run begins in this device's buffer."""
  receive_size: Int[Array, "P"]
  receive_source: Int[Array, "P"]
  """Where each sender's run begins among its own rows."""
  received: Int[Array, "P L"]
  """Rows in the buffer, by sender and local expert."""
  lost: Int[Array, "E"]
  """This device's rows that did not fit, by expert."""


def make_offsets(
  load: Int[Array, "E"], axis: str, num_rows: int, num_received: int
) -> Offsets:
  """Exchanges loads over the axis and computes every offset.

  Args:
    load: this device's rows per expert.
    axis: mesh axis.
    num_rows: A.
    num_received: R; rows beyond it are lost, those of later senders first, and within
      a sender those of later experts.
  """
  num_devices, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  num_local = load.shape[0] // num_devices
  loads = jax.lax.all_gather(load, axis).reshape(num_devices, num_devices, num_local)
  size = jnp.sum(loads, axis=2)  # [s, d]
  begin = jnp.minimum(jnp.cumsum(size, axis=0) - size, num_received)
  fitting = jnp.minimum(size, num_received - begin)
  source = jnp.cumsum(size, axis=1) - size
  before = jnp.cumsum(loads, axis=2) - loads
  kept = jnp.clip(fitting[:, :, None] - before, 0, loads)
  return Offsets(
    axis=axis,
    num_rows=num_rows,
    num_received=num_received,
    send_start=source[me],
    send_size=fitting[me],
    send_target=begin[me],
    receive_start=begin[:, me],
    receive_size=fitting[:, me],
    receive_source=source[:, me],
    received=kept[:, me],
    lost=(loads - kept)[me].reshape(-1),
  )


def _run_of(
  index: Int[Array, "n"], start: Int[Array, "P"], size: Int[Array, "P"]
) -> tuple[Int[Array, "n"], Bool[Array, "n"]]:
  """Returns the run each index belongs to, and whether it belongs to any."""
  run = jnp.searchsorted(start + size, index, side="right").astype(jnp.int32)
  run = jnp.minimum(run, start.shape[0] - 1)
  inside = (index >= start[run]) & (index < start[run] + size[run])
  return run, inside


def _move(
  rows: Float[Array, "n *D"],
  length: int,
  axis: str,
  send: tuple[Array, Array, Array],
  receive: tuple[Array, Array, Array],
) -> Float[Array, "m *D"]:
  """Sends runs (start, size, target) and receives runs (start, size, source)."""
  output = jnp.zeros_like(rows, shape=(length, *rows.shape[1:]))
  # Scalars are gathered: as rows each would be padded to a tile of 128.
  if target_platform() != "cpu" and rows.ndim > 1:
    return jax.lax.ragged_all_to_all(
      rows, output, send[0], send[1], send[2], receive[1], axis_name=axis
    )
  index = jnp.arange(length, dtype=jnp.int32)
  run, inside = _run_of(index, receive[0], receive[1])
  everything = jax.lax.all_gather(rows, axis)
  place = jnp.clip(receive[2][run] + index - receive[0][run], 0, rows.shape[0] - 1)
  picked = everything.at[run, place].get(mode="promise_in_bounds")
  return jnp.where(inside.reshape(-1, *(1,) * (rows.ndim - 1)), picked, output)


@jax.custom_vjp
@parts.of_part(parts.EXCHANGE)
def send(rows: Float[Array, "A *D"], offsets: Offsets) -> Float[Array, "R *D"]:
  """Sends each row to its expert's device; the rest of the buffer is zero."""
  outgoing = (offsets.send_start, offsets.send_size, offsets.send_target)
  incoming = (offsets.receive_start, offsets.receive_size, offsets.receive_source)
  return _move(rows, offsets.num_received, offsets.axis, outgoing, incoming)


@jax.custom_vjp
@parts.of_part(parts.EXCHANGE)
def send_back(rows: Float[Array, "R *D"], offsets: Offsets) -> Float[Array, "A *D"]:
  """Returns rows moved by `send` to their senders; lost rows are zero."""
  outgoing = (offsets.receive_start, offsets.receive_size, offsets.receive_source)
  incoming = (offsets.send_start, offsets.send_size, offsets.send_target)
  return _move(rows, offsets.num_rows, offsets.axis, outgoing, incoming)


# Each is a partial permutation and the transpose of the other.
send.defvjp(
  lambda rows, offsets: (send(rows, offsets), offsets),
  lambda offsets, grad: (send_back(grad, offsets), None),
)
send_back.defvjp(
  lambda rows, offsets: (send_back(rows, offsets), offsets),
  lambda offsets, grad: (send(grad, offsets), None),
)


def by_expert(
  offsets: Offsets,
) -> tuple[Int[Array, "R"], Int[Array, "R"], Bool[Array, "R"]]:
  """Sorts the received rows, ordered by sender, by local expert.

  Returns:
    Each row's place in expert order (arbitrary if unused), the row at each place, and
    which rows are used.
  """
  index = jnp.arange(offsets.num_received, dtype=jnp.int32)
  sender, used = _run_of(index, offsets.receive_start, offsets.receive_size)
  within = index - offsets.receive_start[sender]
  ends = jnp.cumsum(offsets.received, axis=1)
  expert = jnp.sum((ends[sender] <= within[:, None]).astype(jnp.int32), axis=1)
  expert = jnp.minimum(expert, offsets.received.shape[1] - 1)
  total = jnp.sum(offsets.received, axis=0)
  start = (jnp.cumsum(total) - total)[None, :]
  start = start + jnp.cumsum(offsets.received, axis=0) - offsets.received
  place = start[sender, expert] + within - (ends - offsets.received)[sender, expert]
  target = jnp.where(used, place, offsets.num_received)
  row = jnp.zeros_like(place).at[target].set(index, mode="drop", unique_indices=True)
  return place, row, used
