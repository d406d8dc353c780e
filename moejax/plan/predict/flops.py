"""Executed FLOPs of a train step on one device, with recomputation and padding.

Only products count, and a multiply-add is two FLOPs, as in `cost/flops` and in
`hlo/flops`, which counts them in a compiled program. Executed in addition to three times
the forward pass:

  recomputation  a checkpointed layer runs its forward products again, except those whose
                 result no gradient needs: the last product of a feed-forward, and the
                 last one of the experts if gates multiply the hidden activations (sorted
                 rows, and slots that are exchanged) or if `remat=full` keeps the returned
                 rows; `dots` recomputes experts only
  attention      splash (TPU) visits whole blocks on and below the diagonal, and computes
                 scores in both kernels of its backward pass; cuDNN visits all blocks, and
                 recomputes scores in its backward pass
  padding        slots without a token are multiplied like others

Letters: A query and key head width, Z value head width, S sequence, H heads.
"""

from moejax.config import Config
from moejax.config.attention import head_widths
from moejax.layers.tpu_attention import block_size
from moejax.plan.predict.load import Load

_CUDNN_HEAD = {True: 256, False: 128}
"""Widest head of cuDNN's attention, by `Load.has_kernels`."""


def executed_flops(config: Config, load: Load) -> dict[str, float]:
  """Returns the FLOPs of a step on one device by part, with their sum as `total`.

  Args:
    config: validated.
    load: of one device.
  """
  forward = load.forward
  tokens = load.tokens * load.microbatches / load.mesh["tensor"]
  remat, d = config.model.remat, load.dims
  again = 1.0 if remat in ("all", "full", "offload") else 0.0
  post = config.model.norm_placement != "pre"

  def feed_forward(matrices: int) -> float:
    """Returns the executed FLOPs of a feed-forward, in forward passes."""
    return 3 + again * (1 if post else (matrices - 1) / matrices)

  flops = {
    "attention": forward["attention"] * (3 + again),
    "attention_scores": _scores(config, load) * tokens,
    "dense": forward["dense"] * feed_forward(d.matrices),
    "shared_experts": forward["shared_experts"] * feed_forward(d.expert_matrices),
    "router": forward["router"] * (3 + again) * load.mesh["tensor"],
    "head": forward["head"] * 3,
  }
  for part in flops.keys() - {"attention_scores"}:
    flops[part] *= tokens
  flops["experts"] = _experts(config, load)
  if config.moe.balance_scope == "batch" and load.microbatches > 1:
    # Loads are counted in a separate forward pass (train/step.py).
    flops["counting"] = tokens * (forward["total"] - forward["head"])
  return flops | {"total": sum(flops.values())}


def _experts(config: Config, load: Load) -> float:
  """Returns the FLOPs of the routed experts in a step."""
  d = load.dims
  layers = 0 if d.is_twin else len(d.moe_layers)
  rows = load.rows
  if load.dispatcher == "grouped" and not load.has_kernels:
    # One masked product over the whole buffer for each expert (`ragged_dot`).
    rows = load.buffer * load.parts * load.local
  one = 2.0 * d.width * d.expert_hidden * rows / load.mesh["tensor"]
  return layers * load.microbatches * one * expert_products(config, load)


def expert_products(config: Config, load: Load) -> int:
  """Returns how many products with expert matrices a step has, with repeated ones."""
  matrices, remat = load.dims.expert_matrices, config.model.remat
  chunked = config.moe.expert_chunks > 1
  if load.dispatcher == "grouped":
    # Parts and chunks are always checkpointed, whatever the policy.
    own = (load.exchange == "ragged" and load.parts > 1) or chunked
    return 3 * matrices + (matrices - 1 if own or remat != "none" else 0)
  if remat == "none":
    own = chunked and load.exchange == "all_to_all"
    return 3 * matrices + (matrices - 1 if own else 0)
  kept = load.exchange == "all_to_all" and remat in ("full", "offload")
  return 4 * matrices - (kept or load.gates_travel)


def _scores(config: Config, load: Load) -> float:
  """Returns the FLOPs of attention scores and mixing per token of a step, all layers."""
  model, length = config.model, config.data.sequence_length
  widths = head_widths(model)
  key, value = widths.query, widths.value
  kernel, seen = attention_kernel(config, load), float(length)
  again = 0 if model.remat == "none" else 1
  forward, backward = key + value, 2 * (key + value)
  match kernel:
    case "splash":
      block = block_size(length) or length
      blocks = length // block
      seen *= (blocks + 1) / (2 * blocks)
      # Two kernels: d query from three products, d key and d value from four.
      backward = (2 * key + value) + (2 * key + 2 * value)
    case "cudnn":
      # Values are padded to the width of keys; scores are recomputed.
      forward, backward = 2 * key, 5 * key
  return (
    2.0 * model.num_layers * model.num_heads * seen * (forward * (1 + again) + backward)
  )


def attention_kernel(config: Config, load: Load) -> str:
  """Returns splash, cudnn or plain, by the rule of `layers/attend` for a train step."""
  model, family = config.model, load.family
  if model.positions != "rotary":
    return "plain"
  if family == "tpu" and block_size(config.data.sequence_length):
    return "splash"
  width = head_widths(model).query
  limit = _CUDNN_HEAD[load.has_kernels]
  fused = family == "gpu" and model.dtype == "bfloat16" and not model.attention_sinks
  return "cudnn" if fused and width % 8 == 0 and width <= limit else "plain"
