"""Model FLOPs per token, by part: those the model requires, not those executed.

Conventions, which differ between codebases:

- A multiply-accumulate is 2 FLOPs; training is 3 times the forward pass (the
  backward is one product for the input and one for the weight).
- Only matmuls count, including the output head, tied or not. Norms, softmaxes,
  activations, rotary embeddings and the embedding lookup do not.
- Attention scores and their weighted sum take 4*S*H*head_dim per token and layer in
  the forward pass: the full square, as in PaLM (arXiv:2204.02311, appendix B), so
  that utilisation is comparable with published figures. `causal=True` counts only
  pairs that a causal mask keeps, about half. A sliding window shorter than S
  replaces S in both.
- A token counts its K experts (under router soft, its share of the slots) and all
  shared experts; empty slots, dropped tokens and recomputation change nothing.

Letters: D width, F expert hidden width, E experts, K choices per token, H heads,
S sequence, V vocabulary.
"""

from moejax.config import Config
from moejax.config.router import make_router
from moejax.cost.parameters import dimensions, router_sizes

TRAINING_OVER_FORWARD = 3

PARTS = (
  "attention",
  "attention_scores",
  "dense",
  "experts",
  "shared_experts",
  "router",
  "head",
)
"""`attention` is the four projections; `attention_scores` the part that grows with S."""


def mean_context(sequence_length: int, window: int, *, causal: bool) -> float:
  """Returns the positions that attention counts per token, averaged over a sequence.

  Args:
    sequence_length: S.
    window: the sliding window, 0 for none.
    causal: counts only pairs that the causal mask keeps, not the full square.
  """
  span = min(window, sequence_length) if window else sequence_length
  if not causal:
    return float(span)
  # Token i sees min(i + 1, span) positions: a ramp of `span`, then a plateau.
  pairs = span * (span + 1) // 2 + (sequence_length - span) * span
  return pairs / sequence_length


def forward_flops_per_token(
  config: Config,
  vocab_size: int,
  *,
  sequence_length: int | None = None,
  causal: bool = False,
) -> dict[str, float]:
  """Returns the forward pass's FLOPs per token, by part, with their sum as `total`.

  Args:
    config: validated.
    vocab_size: V.
    sequence_length: S; None is `data.sequence_length`.
    causal: see the module's conventions.
  """
  d = dimensions(config, vocab_size)
  length = sequence_length or config.data.sequence_length
  context = mean_context(length, config.model.sliding_window, causal=causal)
  projections = d.width * d.head_dim * (2 * d.num_heads + 2 * d.num_kv_heads)
  scores = 2 * d.num_heads * d.head_dim * context

  router, sizes = make_router(config.moe), router_sizes(config)
  num_sparse = 0 if d.is_twin else len(d.moe_layers)
  num_twin = len(d.moe_layers) if d.is_twin else 0
  expert = d.expert_matrices * d.width * d.expert_hidden
  gate = d.width if config.moe.shared_gate else 0
  dense = d.matrices * d.num_dense_layers * d.hidden
  dense += d.expert_matrices * num_twin * d.twin_hidden
  macs = {
    "attention": d.num_layers * projections,
    "attention_scores": d.num_layers * scores,
    "dense": d.width * dense,
    "experts": num_sparse * router.experts_per_token(sizes) * expert,
    "shared_experts": num_sparse * (d.expert_matrices * d.width * d.shared_hidden + gate),
    "router": num_sparse * router.macs(sizes),
    "head": d.width * d.vocab_size,
  }
  flops = {part: 2.0 * macs[part] for part in PARTS}
  flops["total"] = sum(flops.values())
  return flops


def flops_per_token(
  config: Config,
  vocab_size: int,
  *,
  sequence_length: int | None = None,
  causal: bool = False,
) -> dict[str, float]:
  """Returns training FLOPs per token (forward and backward), by part and in `total`.

  Model FLOP/s and utilisation are based on it. Arguments as in
  `forward_flops_per_token`.
  """
  forward = forward_flops_per_token(
    config, vocab_size, sequence_length=sequence_length, causal=causal
  )
  return {part: TRAINING_OVER_FORWARD * value for part, value in forward.items()}
