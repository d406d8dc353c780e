"""Balancing by a bias that only choosing sees: how a step moves it.

A router whose spec names an `update_bias` keeps one number per expert, which is
added to the scores for choosing and never reaches a gate or a gradient. After the
optimizer's step it is replaced, once, by a function of what the whole batch did
(`RouterStats` summed over groups, devices and microbatches). Never in evaluation.

Letters: T tokens, E experts, K choices per token, M bins, l any leading axes of layers.
Sources: DeepSeek-V3, arXiv:2412.19437, section 2.1.2 (`sign_step`); Quantile Balancing,
Jianlin Su, kexue.fm/archives/11619, 2026 (`quantile_balance`; also in Marin and
Megatron). `quantile_step` estimates the same quantile from two moments and goes a part
of the way; docs/routing.md has its derivation and what both were measured to do.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.routing.base import RouterOptions, RouterStats
from moejax.routing.losses import mean_load, updated_bias

_LEAST_SPREAD = 1e-4
"""Of an expert's scores over tokens: keeps a router of equal scores moving."""


def sign_step(
  bias: Float[Array, "*l E"], stats: RouterStats, options: RouterOptions
) -> Float[Array, "*l E"]:
  """Up by a fixed rate where the load was below its mean, down where above."""
  return updated_bias(bias, stats.chosen, options.bias_update_rate, _present(stats))


def _present(stats: RouterStats) -> Bool[Array, "*l E"] | None:
  return None if stats.present is None else stats.present > 0


def _wanted_load(stats: RouterStats) -> Float[Array, "*l 1"]:
  """Assignments per expert at balance, among those that took part."""
  present = _present(stats)
  if present is None:
    return jnp.mean(stats.chosen, axis=-1, keepdims=True)
  return mean_load(stats.chosen, present)


def _settled(
  bias: Float[Array, "*l E"], moved: Float[Array, "*l E"], stats: RouterStats
) -> Float[Array, "*l E"]:
  """The moved biases with mean zero; the old one where nothing was seen of an expert."""
  present = _present(stats)
  if present is not None:
    moved = jnp.where(present, moved, bias)
  moved = moved - jnp.mean(moved, axis=-1, keepdims=True)
  return jnp.where(stats.num_valid[..., None] > 0, moved, bias)


def quantile_step(
  bias: Float[Array, "*l E"], stats: RouterStats, options: RouterOptions
) -> Float[Array, "*l E"]:
  """A part of the way to the bias at which every expert would get its share.

  An expert is chosen by the tokens whose score stands above some threshold, so its
  share of tokens f is a tail of the distribution of its scores. Were that normal
  with standard deviation s, moving the bias by s * (z(K/E) - z(f)), z the normal
  quantile, would make the share K/E. Whatever the distribution, the step is zero
  at balance (but for rounding) and has the sign of the error; only its length is
  approximate, and `options.quantile_rate` of it is taken. Biases keep mean zero.
  """
  assert stats.moments is not None
  tokens = jnp.maximum(stats.num_valid, 1.0)[..., None]
  first, second = stats.moments[..., 0, :] / tokens, stats.moments[..., 1, :] / tokens
  spread = jnp.sqrt(jnp.maximum(second - first * first, _LEAST_SPREAD**2))
  # No expert is certain never, or always, to be chosen: half a token at least.
  least = 0.5 / tokens
  share = jnp.clip(stats.chosen / tokens, least, 1.0 - least)
  target = jnp.clip(_wanted_load(stats) / tokens, least, 1.0 - least)
  quantile = jax.scipy.special.ndtri
  moved = bias + options.quantile_rate * spread * (quantile(target) - quantile(share))
  return _settled(bias, moved, stats)


NUM_BINS = 1024
"""M, of a histogram of margins."""
_LARGEST_MARGIN = 2.0
"""Scores are in (0, 1), and biases in (-1, 1) if they balance anything."""


def margins(
  biased: Float[Array, "T E"], valid: Bool[Array, "T"], num_selected: int
) -> Float[Array, "E M"]:
  """Valid tokens by expert and by bin of s_te + b_e - alpha_t.

  alpha_t is the K+1-th largest biased score of the token: an expert is chosen where its
  margin is above zero, and lowering its bias by q, all others staying as they are,
  leaves it the tokens whose margin is above q. A histogram, because it adds up over
  groups, devices and microbatches, as a quantile does not. Bins are narrow around zero,
  where the quantile is near balance: 8e-6 wide there, 4e-3 at a margin of 1/2.

  Args:
    biased: scores with their biases, by which tokens choose.
    valid: False for padding.
    num_selected: K.
  """
  num_experts = biased.shape[-1]
  order = min(num_selected, num_experts - 1)
  # An absent expert stands at -inf. Where no more than K take part, all of them are
  # chosen whatever their biases are, and nothing is learned about balance.
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
  bias: Float[Array, "*l E"], stats: RouterStats, options: RouterOptions
) -> Float[Array, "*l E"]:
  """The bias at which every expert would have had its share of this batch.

  b_e = -beta_e, beta_e the (TK/E)-th largest of s_te - alpha_t over the batch's tokens;
  then mean zero. Margins have the old bias in them, so that this is b_e less the
  (TK/E)-th largest margin, which is read out of their histogram, linearly within a bin.
  There is no rate.
  """
  assert stats.margins is not None
  edges = jnp.linspace(-1.0, 1.0, NUM_BINS + 1, dtype=jnp.float32)
  edges = _LARGEST_MARGIN * jnp.sign(edges) * jnp.square(edges)
  wanted = _wanted_load(stats)
  # From the top: tokens in and above each bin.
  above = jnp.flip(jnp.cumsum(jnp.flip(stats.margins, axis=-1), axis=-1), axis=-1)
  # The highest bin from which on there are enough; the lowest where there never are.
  enough = above >= wanted[..., None]
  here = jnp.maximum(jnp.sum(enough.astype(jnp.int32), axis=-1) - 1, 0)

  def at(values: Float[Array, "*l E M"]) -> Float[Array, "*l E"]:
    return jnp.take_along_axis(values, here[..., None], axis=-1)[..., 0]

  inside = at(stats.margins)
  missing = jnp.maximum(wanted - (at(above) - inside), 0.0)
  part = jnp.minimum(missing / jnp.maximum(inside, 1.0), 1.0)
  low, high = edges[here], edges[here + 1]
  return _settled(bias, bias - (high - part * (high - low)), stats)
