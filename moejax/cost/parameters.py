"""Parameter counts of a model, by part: total and active.

Closed formulas over the configuration, independent of the model's own parameter tree,
so that the two can check each other. Active parameters are those that a token uses: K
of the routed experts, and everything else in full. The embedding table counts in full
in both, as in published figures.

Letters: D width, F expert hidden width, E experts, K choices per token, H heads,
L layers, V vocabulary; m segments per expert (DeepSeekMoE, arXiv:2401.06066,
section 3.1: m*E experts of width F/m, m*K chosen).
"""

import copy
import dataclasses
import math

from moejax.config import Config, ModelConfig
from moejax.config.encoder import encoder_config
from moejax.config.pattern import dense_layers
from moejax.config.ranges import GATED
from moejax.config.router import make_router, num_selected, sizes
from moejax.cost.attention import (
  attention_matrices,
  attention_norms,
  attention_vectors,
)
from moejax.routing.router import Sizes

BYTES_VOCABULARY = 264
"""V of the byte tokenizer: 256 bytes and 8 reserved ids."""

PARTS = (
  "embedding",
  "attention",
  "dense",
  "experts",
  "shared_experts",
  "router",
  "norms",
  "head",
)
"""The parts that are counted; `dense` is the dense feed-forward layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dimensions:
  """Sizes used by all formulas, derived from the configuration."""

  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  vocab_size: int
  hidden: int
  """Hidden width of the dense feed-forward layers."""
  matrices: int
  """Matrices per dense feed-forward block: 3 if the activation is gated, else 2."""
  expert_matrices: int
  """Likewise for an expert, a shared expert, and a dense twin of an MoE layer."""
  moe_layers: tuple[int, ...]
  """Indices of the MoE layers, or of their dense twins."""
  twin_hidden: int
  """Hidden width of an MoE layer's dense twin: K*F plus that of the shared experts."""
  has_second: bool
  """Whether a dense feed-forward follows each MoE layer."""
  is_twin: bool
  num_experts: int
  """E, after segmentation."""
  num_selected: int
  """K, after segmentation; E under router dense."""
  expert_hidden: int
  """F of one expert, after segmentation."""
  shared_hidden: int
  """Total hidden width of the shared experts."""

  @property
  def num_dense_layers(self) -> int:
    """Number of dense feed-forwards of `hidden`, including those after MoE layers."""
    after = len(self.moe_layers) if self.has_second else 0
    return self.num_layers - len(self.moe_layers) + after


def resolve_vocab_size(config: Config) -> int:
  """Returns V without reading data: `model.vocab_size` if set, else the tokenizer's.

  A bpe tokenizer trained on a very small corpus can be smaller than the returned
  `data.vocab_size`.
  """
  if config.model.vocab_size:
    return config.model.vocab_size
  spans = config.data.objective == "span_corruption"
  sentinels = config.data.num_sentinels if spans else 0
  if config.data.tokenizer == "bytes":
    return BYTES_VOCABULARY + sentinels
  return config.data.vocab_size + sentinels


def moe_layer_indices(config: Config) -> tuple[int, ...]:
  """Returns the layers whose feed-forward is MoE (or, in a dense twin, replaces one)."""
  moe = config.moe
  first = moe.dense_prefix + moe.offset % moe.every
  dense = dense_layers(moe)
  sparse = range(first, config.model.num_layers, moe.every)
  return tuple(layer for layer in sparse if layer not in dense)


def dimensions(config: Config, vocab_size: int) -> Dimensions:
  """Returns the sizes, deriving those that are 0 in the configuration."""
  model, moe = config.model, config.moe
  selected = num_selected(moe)
  return Dimensions(
    num_layers=model.num_layers,
    width=model.width,
    num_heads=model.num_heads,
    num_kv_heads=model.num_kv_heads or model.num_heads,
    head_dim=model.head_dim or model.width // model.num_heads,
    vocab_size=model.padded(vocab_size),
    hidden=model.hidden,
    matrices=_matrices(model.activation),
    expert_matrices=_matrices(moe.activation or model.activation),
    moe_layers=moe_layer_indices(config),
    twin_hidden=selected * moe.fine_hidden + moe.shared_width,
    has_second=moe.dense_after,
    is_twin=moe.dense_twin,
    num_experts=moe.fine_experts,
    num_selected=selected,
    expert_hidden=moe.fine_hidden,
    shared_hidden=moe.shared_width,
  )


def _matrices(activation: str) -> int:
  return 3 if activation in GATED else 2


def expert_biases(config: Config, d: Dimensions) -> int:
  """Returns the biases of one routed expert: one per output of each matrix."""
  if not config.moe.expert_bias:
    return 0
  return (d.expert_matrices - 1) * d.expert_hidden + d.width


def dense_twin(config: Config) -> Config:
  """Returns the configuration with MoE layers made dense, at equal active FLOPs."""
  twin = copy.deepcopy(config)
  twin.moe.dense_twin = True
  return twin


def count_parameters(
  config: Config, vocab_size: int
) -> tuple[dict[str, int], dict[str, int]]:
  """Returns the total and active parameter counts of the model.

  Args:
    config: validated.
    vocab_size: V; see `resolve_vocab_size`.

  Returns:
    Two dicts, total and active, with a key for each of `PARTS` and their sum as
    `total`.
  """
  total, active = _count_stack(config, vocab_size)
  if config.model.kind == "encoder_decoder":
    encoder, used = _count_stack(encoder_config(config), vocab_size)
    cross = cross_parameters(config.model)
    shared = ("head",) if config.model.encoder_embedding else ("head", "embedding")
    for counts, of in ((total, encoder), (active, used)):
      for part in PARTS:
        # One head serves both stacks, and one embedding as a rule.
        if part not in shared:
          counts[part] += of[part]
      counts["attention"] += cross["attention"]
      counts["norms"] += cross["norms"]
  for counts in (total, active):
    counts["total"] = sum(counts.values())
  return total, active


def cross_parameters(model: ModelConfig) -> dict[str, int]:
  """Returns the parameters of all cross-attentions: `attention` and `norms`."""
  norms = model.width * (2 if model.norm_placement == "both" else 1)
  attention = attention_matrices(model) + attention_vectors(model)
  return {
    "attention": model.num_layers * attention,
    "norms": model.num_layers * (norms + attention_norms(model)),
  }


def _count_stack(
  config: Config, vocab_size: int
) -> tuple[dict[str, int], dict[str, int]]:
  """Returns the counts of a decoder without an encoder, by part."""
  d = dimensions(config, vocab_size)
  attention = attention_matrices(config.model) + attention_vectors(config.model)
  norms = 2 * d.width + attention_norms(config.model)
  if config.model.norm_placement == "both":
    norms += 2 * d.width
  per_second = 2 if config.model.norm_placement == "both" else 1
  second_norms = len(d.moe_layers) * per_second * d.width if d.has_second else 0
  expert = d.expert_matrices * d.width * d.expert_hidden + expert_biases(config, d)
  gate = d.width if config.moe.shared_gate else 0
  sparse_layers = 0 if d.is_twin else len(d.moe_layers)
  twin_layers = len(d.moe_layers) if d.is_twin else 0
  dense = d.matrices * d.num_dense_layers * d.hidden
  dense += d.expert_matrices * twin_layers * d.twin_hidden
  shared = d.expert_matrices * d.width * d.shared_hidden

  total = {
    "embedding": d.vocab_size * d.width,
    "attention": d.num_layers * attention + position_biases(config.model),
    "dense": d.width * dense,
    "experts": sparse_layers * d.num_experts * expert,
    "shared_experts": sparse_layers * (shared + gate),
    "router": sparse_layers * router_parameters(config, d),
    "norms": d.num_layers * norms + second_norms + d.width,
    "head": 0 if config.model.tie_embeddings else d.vocab_size * d.width,
  }
  return total, dict(total, experts=sparse_layers * d.num_selected * expert)


def position_biases(model: ModelConfig) -> int:
  """Returns the numbers in a stack's table of relative positions."""
  relative = model.positions == "relative"
  return model.relative_buckets * model.num_heads if relative else 0


def router_parameters(config: Config, d: Dimensions) -> int:
  """Returns the count per MoE layer, without hash routing's table, which is data."""
  own = make_router(config.moe).parameters(router_sizes(config))
  bias = d.num_experts if config.moe.router_bias else 0
  own_sizes = sum(math.prod(p.shape) for p in own.values())
  pruned = config.moe.pruned_rows * (d.width + config.moe.router_bias)
  return d.width * d.num_experts + bias + pruned + own_sizes


def router_sizes(config: Config) -> Sizes:
  """Returns the sizes of an MoE layer's router."""
  return sizes(config.moe, config.model.width, group_tokens(config))


def group_tokens(config: Config) -> int:
  """Returns T of a routing group; a whole-batch group counts as one sequence."""
  size = config.moe.group_size
  return size if size > 0 else config.data.sequence_length
