"""The work of one device in one microbatch, under even routing.

Letters: T tokens of a routing group, E experts, K choices per token, C slots per
expert and group, P devices of the `expert` axis, A assignments of a device, R rows of
its buffer.
"""

import dataclasses
from collections.abc import Mapping

from moejax.config import Config
from moejax.config.exchange_rule import buffer_factor, choose
from moejax.config.mesh import token_shards
from moejax.config.router import capacity, make_router, num_selected
from moejax.cost.flops import forward_flops_per_token
from moejax.cost.parameters import Dimensions, dimensions, resolve_vocab_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """Sizes of one device's work."""

  family: str
  """tpu, gpu or cpu."""
  has_kernels: bool
  """Whether a GPU program has the kernels that are only chosen on a real GPU: products of
  just the rows in use (tokamax), and cuDNN's attention for wider heads."""
  mesh: Mapping[str, int]
  microbatches: int
  sequences: int
  """Of a microbatch."""
  tokens: int
  """Of a microbatch."""
  exchange: str
  """One of `exchange_rule.CARRIES`; also none if no layer is MoE."""
  dispatcher: str
  choices: float
  """A, the assignments of its tokens if rows are sorted, else slots."""
  rows: float
  """Rows in use, which experts multiply."""
  buffer: float
  """R, the rows that the buffer holds at a time."""
  parts: int
  """Number of parts in which rows are sent (exchange_chunks)."""
  local: int
  """Experts per device."""
  dims: Dimensions
  forward: Mapping[str, float]
  """FLOPs of the forward pass per token by part; see `cost.flops`."""

  @property
  def gates_travel(self) -> bool:
    """Whether gates are sent to the experts with the rows, so that the backward pass
    does not need the experts' output; for slots, only under recomputation."""
    slots = self.exchange == "all_to_all" and self.dispatcher == "gather"
    return slots or self.exchange == "ragged"

  def on(self, mesh: Mapping[str, int]) -> "Load":
    """Returns the load on another mesh of the same token shards and `expert` axis."""
    return dataclasses.replace(self, mesh=mesh)


def load_of(
  config: Config, mesh: Mapping[str, int], family: str, *, has_kernels: bool = True
) -> Load:
  """Returns the load of one device.

  Args:
    config: validated for these devices.
    mesh: devices per axis.
    family: of the chips; decides the dispatcher if it is auto.
    has_kernels: False for a GPU program that is compiled on a machine without a GPU.
  """
  moe, train = config.moe, config.train
  length, devices = config.data.sequence_length, mesh["expert"]
  shards = token_shards(mesh)
  sequences = train.batch_size // train.accumulation // shards
  tokens = sequences * length
  selected, router = num_selected(moe), make_router(moe)
  vocab_size = resolve_vocab_size(config)
  d = dimensions(config, vocab_size)
  kind, dispatcher = choose(
    moe.exchange,
    moe.dispatcher,
    num_selected=selected,
    capacity=moe.capacity_factor is not None,
    mixes=router.mixes,
    devices=devices,
    platform=family,
  )
  size = moe.group_size or length
  size = tokens * shards if size == -1 else size
  slots = capacity(moe, size, moe.capacity_factor)
  choices = float(tokens * selected)
  # Dropless slots have room for all tokens at every expert.
  filled = tokens / size * (slots or size) * moe.fine_experts
  is_sorted = dispatcher == "grouped"
  rows = min(choices, filled) if is_sorted else filled
  parts = moe.exchange_chunks if kind in ("ragged", "all_to_all") else 1
  room = rows
  if kind == "ragged":
    room = (
      choices
      / parts
      * buffer_factor(
        moe.exchange_buffer,
        devices=devices,
        num_experts=moe.fine_experts,
        num_selected=selected if router.token_choice else None,
      )
    )
  elif kind == "ring" and is_sorted:
    room = choices * devices
  return Load(
    family=family,
    has_kernels=has_kernels,
    mesh=mesh,
    microbatches=train.accumulation,
    sequences=sequences,
    tokens=tokens,
    exchange="none" if d.is_twin or not d.moe_layers else kind,
    dispatcher=dispatcher,
    choices=choices if is_sorted else filled,
    rows=rows,
    buffer=room,
    parts=parts,
    local=moe.fine_experts // devices,
    dims=d,
    forward=forward_flops_per_token(config, vocab_size),
  )
