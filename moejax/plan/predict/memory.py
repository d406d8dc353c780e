"""Memory of a train step on one device, by kind.

Parameters and moments are exact. The rest is estimated from the arrays that are live at
two points of the step. The larger of the two is the peak:

  head   the loss: logits in float32, three times (logits, exponentials, gradient), but
         twice on a TPU (it never writes exponentials); the vocabulary's gathered weights
         and gradients; and what all layers kept
  layer  the backward pass of an MoE layer: gradients of all parameters in float32, what
         all layers kept, the layer's gathered weights and their gradients, its recomputed
         attention, the rows it received, and hidden activations

Compilers do not pack memory tightly: `PACKING` is bytes reserved over bytes live, the
middle of what was measured on compiled programs (docs/planning.md).

Letters: T tokens of a device's microbatch, D width, F expert hidden width, V vocabulary,
A query and key head width, Z value head width, H query heads, J key/value heads, R rows
of a device's buffer.
"""

import dataclasses
from collections.abc import Mapping

from moejax.config import Config
from moejax.config.attention import head_widths
from moejax.plan.predict.flops import attention_kernel
from moejax.plan.predict.load import Load
from moejax.plan.predict.weights import Shares

PACKING = {"tpu": 1.5, "gpu": 1.1, "cpu": 1.1}
"""By family."""

_LOGITS = {"tpu": 2, "gpu": 3, "cpu": 3}
"""Arrays of the size of the logits that are live in the loss, by family."""
_SCORES = 3
"""Arrays of the size of a layer's attention scores live without a fused kernel."""
_MASKED = 3
"""Masked copies of rows that are live in `ragged_dot` without a kernel."""
_HIDDEN = {3: 5, 2: 3}
"""Arrays of the size of the hidden activations that are live in the experts' backward
pass, by number of matrices: each product's result and gradient, and the activation's
result."""

_OUTSIDE = ("embedding", "head")
"""Parts outside the layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Predicted bytes per device."""

  kinds: Mapping[str, float]
  """Bytes live at the peak; `temporary` includes what packing wastes."""
  peak: str
  """head or layer: where the most memory is live."""

  @property
  def total(self) -> float:
    return sum(self.kinds.values())


def predicted(config: Config, load: Load, shares: Shares) -> Memory:
  """Returns the memory of a step.

  Args:
    config: validated for these devices.
    load: of one device.
    shares: of the model's parameters.
  """
  mesh, gradients = load.mesh, shares.gradients
  fixed = {"parameters": shares.parameters, "moments": shares.moments}
  # The sum over microbatches is live from the first one on, next to one's gradients.
  sums = gradients if load.microbatches > 1 else 0.0
  kept = kept_activations(config, load, shares)
  head = {
    # The GPU compiler reserves their buffers from the beginning.
    "gradients": sums + (0.0 if load.family == "tpu" else gradients),
    "activations": kept,
    "logits": _LOGITS[load.family] * logits(load),
    "exchange": 0.0,
    "temporary": _head_weights(config, shares),
  }
  replicas = gradients if mesh["data"] > 1 else 0.0
  layer = {
    "gradients": gradients + sums + replicas,
    "activations": kept,
    "logits": 0.0,
    "exchange": exchange_buffers(config, load) + masked_rows(config, load),
    "temporary": (
      layer_weights(config, load, shares)
      + hidden(config, load)
      + attention_activations(config, load)
    ),
  }
  if config.model.remat == "offload" and load.family == "tpu":
    # The compiler peels a layer off the loops: its backward pass is live with the logits.
    head = {kind: max(head[kind], layer[kind]) for kind in head}
    head["temporary"] = layer["temporary"] + _head_weights(config, shares)
  peak, live = max(
    (("head", head), ("layer", layer)), key=lambda item: sum(item[1].values())
  )
  live["temporary"] += (PACKING[load.family] - 1) * sum(live.values())
  return Memory(kinds=fixed | live, peak=peak)


def bytes_of(config: Config) -> int:
  """Returns the bytes of a number in the compute dtype."""
  return 2 if config.model.dtype == "bfloat16" else 4


def logits(load: Load) -> float:
  """Returns the bytes of a device's logits: T V, in float32."""
  return 4.0 * load.tokens * load.dims.vocab_size / load.mesh["tensor"]


def kept_activations(config: Config, load: Load, shares: Shares) -> float:
  """Returns what all layers keep for their backward pass, under the remat policy.

  `all` keeps the input of each repeated unit, and so does `offload`, except on CPU;
  `full` also keeps what experts exchanged; `dots` the input and the products of attention
  and dense layers; `none` everything, including gathered weights.
  """
  d, remat, size = load.dims, config.model.remat, bytes_of(config)
  units = d.num_layers - len(d.moe_layers) * (config.moe.every - 1)
  inputs = float(size * load.tokens * d.width * units)
  if remat == "all" or (remat == "offload" and load.family != "cpu"):
    return inputs
  sparse = 0 if d.is_twin else len(d.moe_layers)
  if remat in ("full", "offload"):
    # Rows are kept where they arrive; on both sides of the experts if gates stay behind.
    slots = 1 if load.gates_travel else 2
    copies = {"ragged": 1, "ring": 1, "all_to_all": slots}.get(load.exchange, 0)
    copies = 0 if load.parts > 1 and load.exchange == "ragged" else copies
    rows = load.tokens * load.mesh["expert"] if load.exchange == "ring" else load.buffer
    return inputs + sparse * copies * size * rows * d.width
  kept = inputs + d.num_layers * attention_activations(config, load)
  wide = (d.matrices + 1) * d.hidden / load.mesh["tensor"] + d.width
  kept += d.num_dense_layers * size * load.tokens * wide
  shared = (d.expert_matrices + 1) * d.shared_hidden / load.mesh["tensor"] + d.width
  kept += sparse * size * load.tokens * shared
  if remat == "dots":
    return kept
  kept += size * sum(
    numbers for part, numbers in shares.gathered.items() if part not in _OUTSIDE
  )
  return kept + sparse * (exchange_buffers(config, load) + hidden(config, load))


def attention_activations(config: Config, load: Load) -> float:
  """Returns what a layer's attention keeps for the backward pass: T (2HA + 2HZ + 4D).

  Without a fused kernel also scores, their softmax and a gradient: T S H numbers each.
  """
  model = config.model
  widths, tensor = head_widths(model), load.mesh["tensor"]
  heads = model.num_heads
  kv_heads = heads if model.attention == "latent" else model.num_kv_heads or heads
  numbers = (heads * (widths.query + widths.value)) / tensor
  numbers += kv_heads * (widths.query + widths.value) / tensor + 4 * model.width
  size = bytes_of(config) * load.tokens * numbers
  if attention_kernel(config, load) == "plain":
    length = config.data.sequence_length
    size += _SCORES * 4.0 * load.tokens * length * heads / tensor
  return size


def exchange_buffers(config: Config, load: Load) -> float:
  """Returns the bytes of a layer's rows: those sent, those received, and the gradients of
  both; also a copy in the experts' order if a device has several."""
  d = load.dims
  if d.is_twin or not d.moe_layers:
    return 0.0
  size = bytes_of(config) * d.width
  own = load.choices / load.parts
  if load.exchange in ("none", "all_to_all"):
    return 4.0 * size * load.buffer
  if load.exchange == "ring":
    return 2.0 * size * (load.buffer + load.mesh["expert"] * load.tokens)
  sorts = 1 if load.local > 1 else 0
  return size * (2.0 * own + (2 + 2 * sorts) * load.buffer)


def masked_rows(config: Config, load: Load) -> float:
  """Returns the bytes of the copies of all rows, one per expert, that `ragged_dot` makes
  without a kernel for the three products of a matrix."""
  if load.dispatcher != "grouped" or load.has_kernels or load.local == 1:
    return 0.0
  return _MASKED * bytes_of(config) * load.buffer * load.local * load.dims.width


def hidden(config: Config, load: Load) -> float:
  """Returns the hidden activations of one chunk of rows and their gradients: R F each."""
  d = load.dims
  if d.is_twin or not d.moe_layers:
    wide = max(d.hidden, d.twin_hidden)
    rows, matrices, chunks = float(load.tokens), d.matrices, 1
  else:
    wide, rows, matrices = d.expert_hidden, load.buffer, d.expert_matrices
    chunks = expert_chunks(config, load)
  one = bytes_of(config) * rows / chunks * wide / load.mesh["tensor"]
  return one * _HIDDEN[matrices]


def expert_chunks(config: Config, load: Load) -> int:
  """Returns the number of chunks in which the experts of a layer compute their rows; also
  for a ring's buffer of sorted rows."""
  chunked = load.dispatcher == "grouped" or load.exchange == "all_to_all"
  return config.moe.expert_chunks if chunked else 1


def layer_weights(config: Config, load: Load, shares: Shares) -> float:
  """Returns the gathered weights of an MoE layer and their gradients.

  Chunks of expert rows sum gradients in another copy; parts of an exchange do so in
  float32.
  """
  size, experts = bytes_of(config), shares.layer["experts"]
  others = sum(shares.layer.values()) - experts
  copies = 1 + (expert_chunks(config, load) > 1)
  wide = 4 if load.exchange == "ragged" and load.parts > 1 else 0
  return experts * (size * (copies + 2) + 2 * wide) + others * 2 * size


def _head_weights(config: Config, shares: Shares) -> float:
  """Returns the gathered head and its gradient, in the compute dtype."""
  part = "embedding" if config.model.tie_embeddings else "head"
  return 2.0 * bytes_of(config) * shares.gathered[part]
