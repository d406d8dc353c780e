"""Noisy top-k gating: noise that explores, with a scale that is learned or fixed.

Letters: T tokens of one group, E experts, K choices per token.
Sources: Shazeer et al. 2017, arXiv:1701.06538, equations 3 to 5 (learned scale,
softmax over the kept logits); V-MoE, arXiv:2106.05974, section 2.2 (fixed scale 1/E).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.routing import losses
from moejax.routing.base import RouterInputs, RouterOptions, Routing
from moejax.routing.capacity import assign
from moejax.routing.queueing import normalize
from moejax.routing.scores import choose, pick, present, softmax


def noise_scale(inputs: RouterInputs, options: RouterOptions) -> Float[Array, "T E"]:
  """Standard deviation of the noise on each logit."""
  if options.noise == "fixed" or inputs.noise_logits is None:
    scale = options.noise_std / options.num_experts
    return jnp.full(inputs.logits.shape, scale, jnp.float32)
  return jax.nn.softplus(inputs.noise_logits.astype(jnp.float32))


def noisy_top_k(inputs: RouterInputs, options: RouterOptions) -> Routing:
  """The K best of logits + noise; without a key (evaluation) there is no noise.

  noise="learned": gates are a softmax over the K kept noisy logits, the others at
  -inf (set `renormalize="before_drop"`; "none" leaves the softmax over all).
  `losses`: importance_loss over sparse gates and load_loss with Shazeer's threshold.
  noise="fixed": V-MoE. Importance over the clean softmax, load with the K-th largest.
  """
  learned = options.noise == "learned"
  logits = inputs.logits.astype(jnp.float32)
  clean = softmax(logits)
  noisy, slot_key = logits, None
  scale = noise_scale(inputs, options)
  if inputs.key is not None:
    slot_key, noise_key = jax.random.split(inputs.key)
    noisy = logits + scale * jax.random.normal(noise_key, logits.shape, jnp.float32)
  probs = softmax(noisy)
  scores = present(logits, noisy)
  expert = choose(noisy, options.num_selected)
  gate = pick(probs, expert)
  routing = assign(expert, gate, inputs.valid, probs, options, slot_key, scores=scores)
  importance = _sparse(expert, gate, options) if learned else clean
  terms = {"importance_loss": losses.importance_loss(importance, inputs.valid)}
  terms["load_loss"] = jnp.zeros(())
  if inputs.key is not None:
    chance = losses.load_probability(
      logits, noisy, scale, options.num_selected, excluding=learned
    )
    terms["load_loss"] = losses.load_loss(chance, inputs.valid)
  return dataclasses.replace(routing, losses=terms)


def _sparse(
  expert: Array, gate: Float[Array, "T K"], options: RouterOptions
) -> Float[Array, "T E"]:
  """G(x): gates at their experts before drops, zero elsewhere."""
  if options.renormalize != "none":
    gate = normalize(gate, options.renormalize_norm)
  index = jnp.arange(options.num_experts, dtype=jnp.int32)[None, :]
  dense = jnp.zeros((gate.shape[0], options.num_experts), jnp.float32)
  for k in range(gate.shape[-1]):
    dense = dense + jnp.where(index == expert[:, k : k + 1], gate[:, k : k + 1], 0.0)
  return dense
