"""Quantile Balancing: the bias that would have balanced the last batch.

Letters: T tokens, E experts, K choices per token, M bins, l any leading axes of layers.
Source: Jianlin Su, kexue.fm/archives/11619, 2026; also in Marin and Megatron.
docs/routing.md has measurements of this and similar routers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.routing.base import RouterInputs, RouterStats, Routing, SlotPolicy
from moejax.routing.bias import (
  BIAS,
  bias_parameter,
  biased_scores,
  route_biased,
  settled,
  wanted_load,
)
from moejax.routing.router import Parameter, Params, Router, Sizes

NUM_BINS = 1024
"""M, the bins of the margin histogram."""
_LARGEST_MARGIN = 2.0
"""Scores are in (0, 1), and useful biases in (-1, 1)."""


class QuantileBalancing(Router):
  """`bias.SigmoidBias` with the bias that would have balanced the last batch.

  Training accumulates a histogram of margins, from which `quantile_balance` computes
  the bias.
  """

  name = "quantile_balancing"
  summary = "sigmoid_bias whose bias is the quantile that balances the last batch (Su)"
  needs_key = True
  by_sigmoid = True
  selection_bias = BIAS

  def parameters(self, sizes: Sizes) -> dict[str, Parameter]:
    return bias_parameter(sizes)

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    scores, biased = biased_scores(inputs)
    routing = route_biased(inputs, policy, scores, biased)
    if inputs.key is None:
      return routing
    counts = margins(biased, inputs.valid, policy.num_selected)
    stats = dataclasses.replace(routing.stats, extra={"margins": counts})
    return dataclasses.replace(routing, stats=stats)

  def update(self, params: Params, stats: RouterStats) -> dict[str, Float[Array, "..."]]:
    return {BIAS: quantile_balance(params[BIAS], stats)}


def margins(
  biased: Float[Array, "T E"], valid: Bool[Array, "T"], num_selected: int
) -> Float[Array, "E M"]:
  """Counts valid tokens by expert and by bin of the margin s_te + b_e - alpha_t.

  alpha_t is the K+1-th largest biased score of the token: an expert is chosen if its
  margin is above zero, and lowering only its bias by q leaves it the tokens whose
  margin is above q. A histogram can be summed over groups, devices and microbatches; a
  quantile cannot. Bins are narrow around zero, where the quantile is near balance:
  8e-6 wide there, 4e-3 at a margin of 1/2.

  Args:
    biased: biased scores, by which tokens choose.
    valid: False for padding.
    num_selected: K.
  """
  num_experts = biased.shape[-1]
  order = min(num_selected, num_experts - 1)
  # An absent expert has score -inf. If at most K take part, all of them are chosen for
  # any biases, and the batch has no information about balance.
  alpha = jax.lax.top_k(jax.lax.stop_gradient(biased), order + 1)[0][:, order:]
  margin = jnp.where(alpha > -jnp.inf, jax.lax.stop_gradient(biased) - alpha, 0.0)
  root = jnp.sign(margin) * jnp.sqrt(jnp.abs(margin) / _LARGEST_MARGIN)
  index = jnp.floor((root + 1.0) * (NUM_BINS / 2))
  index = jnp.clip(index, 0, NUM_BINS - 1).astype(jnp.int32)
  expert = jnp.arange(num_experts, dtype=jnp.int32)[None, :]
  counted = jnp.broadcast_to(valid.astype(jnp.float32)[:, None], index.shape)
  zeros = jnp.zeros((num_experts, NUM_BINS), jnp.float32)
  return zeros.at[jnp.broadcast_to(expert, index.shape), index].add(counted)


def quantile_balance(
  bias: Float[Array, "*l E"], stats: RouterStats
) -> Float[Array, "*l E"]:
  """Returns the bias that would have given every expert an equal share of this batch.

  b_e = -beta_e, beta_e the (TK/E)-th largest of s_te - alpha_t over the batch's tokens,
  then shifted to mean zero. Margins include the old bias, so this is b_e minus the
  (TK/E)-th largest margin, read from the histogram with linear interpolation in a bin.
  There is no rate.
  """
  counts = stats.extra["margins"]
  edges = jnp.linspace(-1.0, 1.0, NUM_BINS + 1, dtype=jnp.float32)
  edges = _LARGEST_MARGIN * jnp.sign(edges) * jnp.square(edges)
  wanted = wanted_load(stats)
  # Tokens in and above each bin.
  above = jnp.flip(jnp.cumsum(jnp.flip(counts, axis=-1), axis=-1), axis=-1)
  # The highest bin with enough tokens in and above it; the lowest if there is none.
  enough = above >= wanted[..., None]
  here = jnp.maximum(jnp.sum(enough.astype(jnp.int32), axis=-1) - 1, 0)

  def at(values: Float[Array, "*l E M"]) -> Float[Array, "*l E"]:
    return jnp.take_along_axis(values, here[..., None], axis=-1)[..., 0]

  inside = at(counts)
  missing = jnp.maximum(wanted - (at(above) - inside), 0.0)
  part = jnp.minimum(missing / jnp.maximum(inside, 1.0), 1.0)
  low, high = edges[here], edges[here + 1]
  return settled(bias, bias - (high - part * (high - low)), stats)
