"""Balancing by a bias that only choosing sees: how a step moves it.

A router whose spec names an `update_bias` keeps one number per expert, which is
added to the scores for choosing and never reaches a gate or a gradient. After the
optimizer's step it is replaced, once, by a function of what the whole batch did
(`RouterStats` summed over groups, devices and microbatches). Never in evaluation.

Letters: E experts, l any leading axes of layers.
Sources: DeepSeek-V3, arXiv:2412.19437, section 2.1.2 (`sign_step`); `quantile_step`
is ours, docs/routing.md has its derivation and what it was measured to do.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.routing.base import RouterOptions, RouterStats
from moejax.routing.losses import updated_bias

_LEAST_SPREAD = 1e-4
"""Of an expert's scores over tokens: keeps a router of equal scores moving."""


def sign_step(
  bias: Float[Array, "*l E"], stats: RouterStats, options: RouterOptions
) -> Float[Array, "*l E"]:
  """Up by a fixed rate where the load was below its mean, down where above."""
  return updated_bias(bias, stats.chosen, options.bias_update_rate)


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
  target = jnp.mean(stats.chosen, axis=-1, keepdims=True) / tokens
  target = jnp.clip(target, least, 1.0 - least)
  quantile = jax.scipy.special.ndtri
  moved = bias + options.quantile_rate * spread * (quantile(target) - quantile(share))
  moved = moved - jnp.mean(moved, axis=-1, keepdims=True)
  return jnp.where(stats.num_valid[..., None] > 0, moved, bias)
