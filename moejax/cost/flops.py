"""Model FLOPs per token, by part: what the mathematics needs, not what ran.

Conventions, stated because codebases differ on each:

- A multiply-accumulate is 2 FLOPs; training is 3 times the forward pass (the
  backward is one product for the input and one for the weight).
- Matrix products only. Norms, softmaxes, activations, rotary embeddings and the
  embedding's lookup are not counted; the output head is, tied or not.
- Attention scores and their weighted sum take 4*S*H*head_dim a token and layer
  forward, S the sequence length: the whole square, as in PaLM (arXiv:2204.02311,
  appendix B), so that utilisation compares with published figures.
  `causal=True` counts only the pairs a causal mask leaves, about half. A sliding
  window shorter than S bounds the length in both.
- A token is served by exactly its K chosen and all shared experts: capacity's empty
  slots and dropped tokens change nothing here. Nor does recomputation.

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
"""`attention` is its four projections; `attention_scores` what grows with S."""


def mean_context(sequence_length: int, window: int, *, causal: bool) -> float:
  """Positions that attention counts per token, on average over a sequence.

  Args:
    sequence_length: S.
    window: the sliding window, 0 for none.
    causal: count the pairs the causal mask leaves, not the whole square.
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
  """FLOPs of the forward pass per token, by part, with their sum as `total`.

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
  expert = d.matrices * d.width * d.expert_hidden
  gate = d.width if config.moe.shared_gate else 0
  dense_hidden = d.num_dense_layers * d.hidden + num_twin * d.twin_hidden
  macs = {
    "attention": d.num_layers * projections,
    "attention_scores": d.num_layers * scores,
    "dense": d.matrices * d.width * dense_hidden,
    "experts": num_sparse * router.experts_per_token(sizes) * expert,
    "shared_experts": num_sparse * (d.matrices * d.width * d.shared_hidden + gate),
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
  """Training FLOPs per token (forward and backward), by part and in `total`.

  The number behind model FLOP/s and utilisation. Arguments as those of
  `forward_flops_per_token`.
  """
  forward = forward_flops_per_token(
    config, vocab_size, sequence_length=sequence_length, causal=causal
  )
  return {part: TRAINING_OVER_FORWARD * value for part, value in forward.items()}
