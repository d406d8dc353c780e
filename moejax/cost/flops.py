"""Model FLOPs per token, by part: those the model requires, not those executed.

Conventions, which differ between codebases:

- A multiply-accumulate is 2 FLOPs; training is 3 times the forward pass (the
  backward is one product for the input and one for the weight).
- Only matmuls count, including the output head, tied or not. Norms, softmaxes,
  activations, rotary embeddings and the embedding lookup do not.
- Attention scores and their weighted sum take 4*S*H*head_dim per token and layer in
  the forward pass (latent attention: 2*S*H times the widths of a key and a value
  together): the full square, as in PaLM (arXiv:2204.02311, appendix B), so that
  utilisation is comparable with published figures. `causal=True` counts only pairs
  that a causal mask keeps, about half. A sliding window shorter than S replaces S in
  both.
- For an encoder-decoder, a token is a decoder token: the cost of a row of both stacks is
  divided by the decoder's tokens in it. The encoder's attention is never causal.
- A token counts its K experts (under router soft, its share of the slots) and all
  shared experts; empty slots, dropped tokens and recomputation change nothing.

Letters: D width, F expert hidden width, E experts, K choices per token, H heads,
S sequence, V vocabulary.
"""

import copy

from moejax.config import Config
from moejax.config.attention import head_widths
from moejax.config.encoder import encoder_config
from moejax.config.router import make_router
from moejax.config.spans import target_length
from moejax.cost.attention import attention_matrices, score_macs
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
"""`attention` is the projections; `attention_scores` the part that grows with S."""


def tokens_per_step(config: Config) -> int:
  """Returns the tokens of a training step that FLOPs per token are counted for.

  For an encoder-decoder, these are the decoder's tokens; see the module's conventions.
  """
  return config.train.batch_size * target_length(config.data)


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
    sequence_length: S; None means `data.sequence_length`.
    causal: see the module's conventions.
  """
  if config.model.kind == "encoder_decoder":
    return _of_encoder_decoder(config, vocab_size, sequence_length, causal)
  return _of_stack(config, vocab_size, sequence_length, causal)


def _of_encoder_decoder(
  config: Config, vocab_size: int, sequence_length: int | None, causal: bool
) -> dict[str, float]:
  """Returns the FLOPs of a row of both stacks, divided by the decoder's tokens in it."""
  config = copy.deepcopy(config)
  if sequence_length is not None:
    config.data.sequence_length, config.data.decoder_length = sequence_length, 0
  model, seen = config.model, config.data.sequence_length
  length = target_length(config.data)
  flops = _of_stack(config, vocab_size, length, causal)
  encoder = _of_stack(encoder_config(config), vocab_size, seen, False)
  for part in PARTS:
    flops[part] += 0 if part == "head" else encoder[part] * seen / length
  widths = head_widths(model)
  kv_heads = model.num_kv_heads or model.num_heads
  # Queries and the output are of the decoder's tokens, keys and values of the encoder's.
  own = 2 * model.num_heads * widths.query * model.width
  read = 2 * kv_heads * widths.query * model.width * seen / length
  flops["attention"] += 2.0 * model.num_layers * (own + read)
  scores = model.num_heads * (widths.query + widths.value) * seen
  flops["attention_scores"] += 2.0 * model.num_layers * scores
  flops["total"] = sum(flops[part] for part in PARTS)
  return flops


def _of_stack(
  config: Config, vocab_size: int, sequence_length: int | None, causal: bool
) -> dict[str, float]:
  d = dimensions(config, vocab_size)
  length = sequence_length or config.data.sequence_length
  router, sizes = make_router(config.moe), router_sizes(config)
  num_sparse = 0 if d.is_twin else len(d.moe_layers)
  num_twin = len(d.moe_layers) if d.is_twin else 0
  expert = d.expert_matrices * d.width * d.expert_hidden
  gate = d.width if config.moe.shared_gate else 0
  dense = d.matrices * d.num_dense_layers * d.hidden
  dense += d.expert_matrices * num_twin * d.twin_hidden
  macs = {
    "attention": d.num_layers * attention_matrices(config.model),
    "attention_scores": score_macs(config.model, length, causal=causal),
    "dense": d.width * dense,
    "experts": num_sparse * router.experts_per_token(sizes) * expert,
    "shared_experts": num_sparse * (d.expert_matrices * d.width * d.shared_hidden + gate),
    "router": num_sparse * (router.macs(sizes) + d.width * config.moe.pruned_rows),
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
