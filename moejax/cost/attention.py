"""The cost of attention: parameters, products per token, and the cache for decoding.

Closed formulas, as in `cost/parameters`. Letters: D width, H query heads, J key/value
heads, A query and key head width, Z value head width, S sequence.
"""

from moejax.config.attention import cache_width, head_widths, layer_windows
from moejax.config.schema import ModelConfig


def attention_matrices(model: ModelConfig) -> int:
  """Returns the size of one layer's matrices, which is its products per token."""
  width, heads, sizes = model.width, model.num_heads, head_widths(model)
  out = heads * sizes.value * width
  if model.attention == "latent":
    query = heads * sizes.query
    query = model.q_rank * (width + query) if model.q_rank else width * query
    down = width * (model.kv_rank + model.rope_head_dim)
    up = model.kv_rank * heads * (model.nope_head_dim + sizes.value)
    return query + down + up + out
  kv_heads = model.num_kv_heads or heads
  return width * (heads + kv_heads) * sizes.query + width * kv_heads * sizes.value + out


def attention_vectors(model: ModelConfig) -> int:
  """Returns the biases and sinks of one layer."""
  heads, size = model.num_heads, head_widths(model).query
  if model.attention == "latent":
    biases = model.q_rank + model.kv_rank + model.rope_head_dim
  else:
    biases = size * (heads + 2 * (model.num_kv_heads or heads))
  return (
    biases * model.attention_bias
    + model.width * model.attention_out_bias
    + heads * model.attention_sinks
  )


def attention_norms(model: ModelConfig) -> int:
  """Returns the scales of one layer's norms inside attention."""
  if model.attention == "latent":
    return model.q_rank + model.kv_rank
  if not model.qk_norm:
    return 0
  by_head = model.qk_norm_scope == "head"
  groups = 2 if by_head else model.num_heads + (model.num_kv_heads or model.num_heads)
  return groups * head_widths(model).query


def score_macs(model: ModelConfig, sequence_length: int, *, causal: bool) -> float:
  """Returns the products of all layers per token that grow with S.

  For latent attention, those of the naive form, which training runs.
  """
  sizes = head_widths(model)
  contexts = (
    mean_context(sequence_length, window, causal=causal)
    for window in layer_windows(model)
  )
  return model.num_heads * (sizes.query + sizes.value) * sum(contexts)


def mean_context(sequence_length: int, window: int, *, causal: bool) -> float:
  """Returns how many positions attention counts per token, averaged over a sequence.

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


def cache_numbers_per_token(model: ModelConfig) -> int:
  """Returns how many numbers per token all layers cache for decoding."""
  return model.num_layers * cache_width(model)
