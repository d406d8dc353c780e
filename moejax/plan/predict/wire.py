"""Bytes that one device sends in a train step, by collective and mesh axis.

`wire_bound` is the minimum that the sharding requires. This module predicts what the
compiled program sends, which differs in how often something is sent:

  weights       gathered over `fsdp` for the forward and the backward pass. If the
                compiler gathers (attention), recomputation gathers once more; if moejax
                does (experts, router), the backward pass reuses what was gathered.
  gradients     reduce-scattered over `fsdp` in the compute dtype, those of the token
                table in float32; shards are all-reduced over the axes that replicate them
  tokens        sent to their experts and back, in the forward and backward pass, and
                again where recomputation needs it
  tensor        partial sums of activations

Letters: P devices of an axis, D width, A assignments of a device, R rows of its buffer.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping

from moejax.config import Config
from moejax.plan.predict.load import Load
from moejax.plan.predict.weights import Shares, Weight

_GATE = 4
"""Bytes of a gate, which is sent in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
  """The bytes that one kind of collective sends in a step."""

  kind: str
  """all-gather, reduce-scatter, all-reduce or all-to-all."""
  axis: str
  """Mesh axes of its groups, joined by commas."""
  purpose: str
  """weights, gradients, tokens or partial sums."""
  bytes: float
  """Bytes sent by one device."""
  overlaps: bool
  """Whether products can run meanwhile, since they do not wait for the result."""


def sent(
  config: Config, load: Load, shares: Shares, sums: "Gradients | None" = None
) -> list[Sent]:
  """Returns what a device sends in a step.

  Args:
    config: validated for these devices.
    load: of one device.
    shares: of the model's parameters.
    sums: the result of `gradients`, if known.
  """
  sums = sums or gradients(config, shares, load.family)
  rows = [*_weights(config, load, shares, sums), *_tokens(config, load)]
  rows += _partial_sums(config, load)
  return [row for row in rows if row.bytes > 0]


def fraction(devices: int) -> float:
  """Returns (P - 1)/P, the fraction of a buffer that each device of a ring sends."""
  return (devices - 1) / devices


def gathers(config: Config, part: str, family: str) -> int:
  """Returns how often a weight is gathered in a microbatch."""
  if part in ("embedding", "head"):
    # Outside the checkpointed layers: the gathered head is kept, and the token table is
    # needed only once.
    return 1
  if config.model.remat == "none" and part in ("experts", "router"):
    return 1
  # The TPU compiler gathers attention's for recomputation in another layout than for the
  # backward pass.
  recomputed = part == "attention" and family == "tpu" and config.model.remat != "none"
  return 3 if recomputed else 2


def scatters(weight: Weight, mesh: Mapping[str, int], itemsize: int) -> bool:
  """Returns whether the TPU compiler reduce-scatters a gradient over `fsdp`.

  Otherwise it all-reduces the gradient. It scatters if shards are whole tiles of 8 x 128
  numbers of 4 bytes, as observed in the programs of docs/scale.md.

  Args:
    weight: cut over `fsdp`.
    mesh: devices per axis.
    itemsize: bytes of a number of the gradient.
  """
  layer = weight.shape[1:] if weight.path.startswith("unit.") else weight.shape
  lanes = 128 * 4 // itemsize
  if weight.cut_last:
    return layer[-1] // mesh["fsdp"] % lanes == 0
  if weight.part in ("experts", "router", "head"):
    # Scattered by moejax: only the rows of a shard matter.
    return layer[-2] // mesh["fsdp"] % 8 == 0
  if len(layer) == 2:
    return layer[-2] // mesh["fsdp"] % 8 == 0 and layer[-1] % lanes == 0
  return layer[-2] % 8 == 0


@dataclasses.dataclass(frozen=True)
class Gradients:
  """The bytes that a microbatch's gradients send, by axes; depend on the mesh alone."""

  scattered: float
  """Reduce-scattered over `fsdp`."""
  reduced: Mapping[str, float]
  """All-reduced: shards over the axes that replicate them, or whole ones over `fsdp`."""


def gradients(config: Config, shares: Shares, family: str) -> Gradients:
  """Returns what the gradients of a microbatch send."""
  mesh, computed = shares.mesh, 2 if config.model.dtype == "bfloat16" else 4
  scattered, reduced = 0.0, collections.defaultdict[str, float](float)
  for weight in shares.weights:
    if not weight.trained:
      continue
    # Gradients of the token table and of vectors are summed in float32.
    wide = 4 if weight.part in ("embedding", "other") else computed
    if "fsdp" in weight.axes:
      size = weight.gathered(mesh) * wide * fraction(mesh["fsdp"])
      if family != "tpu" or scatters(weight, mesh, wide):
        scattered += size
      else:
        reduced["fsdp"] += 2 * size
    others = [
      axis
      for axis in ("data", "fsdp", "expert")
      if axis not in weight.axes and mesh[axis] > 1
    ]
    if others:
      devices = math.prod(mesh[axis] for axis in others)
      reduced[",".join(others)] += 2 * fraction(devices) * weight.held(mesh) * wide
  return Gradients(scattered, reduced)


def _weights(
  config: Config, load: Load, shares: Shares, sums: Gradients
) -> Iterator[Sent]:
  count = load.microbatches
  computed = 2 if config.model.dtype == "bfloat16" else 4
  share = computed * fraction(load.mesh["fsdp"]) * count
  gathered = share * sum(
    numbers * gathers(config, part, load.family)
    for part, numbers in shares.gathered.items()
    if part != "other"
  )
  if load.family != "tpu":
    # The TPU compiler converts the token table before it gathers it, others after.
    gathered += share / computed * (4 - computed) * shares.gathered["embedding"]
  yield _row("all-gather", "fsdp", "weights", gathered, overlaps=True)
  yield _row("reduce-scatter", "fsdp", "gradients", sums.scattered * count, overlaps=True)
  for axes, size in sums.reduced.items():
    yield _row("all-reduce", axes, "gradients", size * count, overlaps=True)


def exchanges(config: Config, load: Load) -> int:
  """Returns how often rows are exchanged in a layer and microbatch.

  Rows go to the experts and back, in the forward and backward pass. Recomputation sends
  rows again, and back again only if a gate's gradient needs the experts' output (dense
  weights). `remat=full` and `offload` keep what was received, but parts of ragged rows
  are always checkpointed.
  """
  remat = config.model.remat
  if load.exchange == "ragged":
    return 5 if load.parts > 1 or remat in ("all", "dots") else 4
  slots = 1 if load.gates_travel else 2
  again = {"ring": 1, "all_to_all": slots}.get(load.exchange, 0)
  return 4 + (again if remat in ("all", "dots") else 0)


def _tokens(config: Config, load: Load) -> Iterator[Sent]:
  """Yields the exchanges of rows, and of the gates that are sent with them."""
  devices = load.mesh["expert"]
  if devices == 1 or load.exchange == "none":
    return
  layers = len(load.dims.moe_layers) * load.microbatches
  width = load.dims.width * (2 if config.model.dtype == "bfloat16" else 4)
  rows, kind = load.choices, "all-to-all"
  if load.exchange == "ring":
    rows, kind = float(devices * load.tokens), "all-gather"
  times = exchanges(config, load)
  size = layers * times * rows * width * fraction(devices)
  again = config.model.remat != "none"
  if again and load.exchange == "all_to_all" and load.gates_travel:
    # Gates are not sent with the returned rows or their gradients.
    size += layers * (times - 2) * rows * _GATE * fraction(devices)
  yield _row(kind, "expert", "tokens", size, overlaps=False)
  if load.exchange == "ragged":
    # Scalars are gathered from all devices: gates (again if recomputed), and their
    # gradients from the whole buffer.
    twice = times - 3
    gates = twice * load.choices + load.buffer * load.parts
    size = layers * gates * devices * _GATE * fraction(devices)
    yield _row("all-gather", "expert", "tokens", size, overlaps=False)


def _partial_sums(config: Config, load: Load) -> Iterator[Sent]:
  """Yields the all-reduces over `tensor`: one after each product over a cut width, in the
  forward and backward pass, and one more after attention if the layer is recomputed."""
  devices, d = load.mesh["tensor"], load.dims
  if devices == 1:
    return
  again = 0 if config.model.remat == "none" else 1
  width = d.width * (2 if config.model.dtype == "bfloat16" else 4)
  per_layer = (2 + again) + 2
  sums = d.num_layers * per_layer + 2
  size = 2 * fraction(devices) * load.tokens * width * sums * load.microbatches
  yield _row("all-reduce", "tensor", "partial sums", size, overlaps=False)


def _row(kind: str, axis: str, purpose: str, size: float, *, overlaps: bool) -> Sent:
  return Sent(kind=kind, axis=axis, purpose=purpose, bytes=size, overlaps=overlaps)
