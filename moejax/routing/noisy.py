"""Noisy top-k gating: exploration noise with a learned or fixed scale.

Letters: T tokens of one group, E experts, K choices per token.
Sources: Shazeer et al. 2017, arXiv:1701.06538, equations 3 to 5 (learned scale,
softmax over the kept logits); V-MoE, arXiv:2106.05974, section 2.2 (fixed scale 1/E).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.options import Range, option, weight
from moejax.routing import losses
from moejax.routing.base import RouterInputs, Routing, SlotPolicy
from moejax.routing.capacity import assign
from moejax.routing.queueing import normalize
from moejax.routing.router import Parameter, Params, Router, Sizes, Tokens
from moejax.routing.scores import choose, pick, present, softmax


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyTopK(Router):
  """Chooses the K best of logits + noise; without a key (evaluation) no noise is added.

  noise="learned": gates are a softmax over the K kept noisy logits, the others at
  -inf (set `renormalize="before_drop"`; "none" keeps the softmax over all).
  Losses: importance_loss over sparse gates and load_loss with Shazeer's threshold.
  noise="fixed": V-MoE. Importance over the clean softmax, load with the K-th largest
  of all noisy logits.
  """

  name = "noisy_top_k"
  summary = "K best of noisy logits, noise scale learned (Shazeer) or fixed (V-MoE)"
  needs_key = True

  noise: Literal["learned", "fixed"] = option(
    "learned", "a learned scale (Shazeer), or one fixed at noise_std / E (V-MoE)"
  )
  noise_std: float = option(
    1.0,
    "standard deviation of the fixed noise, times E",
    Range(0, 1e4, why_high="the choice would be nothing but noise"),
  )
  importance_weight: float = option(0.01, "weight of CV^2 of the summed gates", weight())
  load_weight: float = option(0.01, "weight of CV^2 of the smooth load", weight())

  def parameters(self, sizes: Sizes) -> dict[str, Parameter]:
    if self.noise == "fixed":
      return {}
    # Shazeer et al., appendix A: zeros, so that all experts are equally noisy.
    shape, axes = (sizes.width, sizes.num_experts), ("width", "router_expert")
    return {"noise": Parameter(shape=shape, axes=axes, by_group=False)}

  def features(
    self, tokens: Tokens, params: Params, policy: SlotPolicy
  ) -> dict[str, Float[Array, "G T ..."]]:
    if self.noise == "fixed":
      return {}
    return {"noise_logits": tokens.project(tokens.seen, params["noise"])}

  def macs(self, sizes: Sizes) -> float:
    return super().macs(sizes) * (2 if self.noise == "learned" else 1)

  def noise_scale(self, inputs: RouterInputs) -> Float[Array, "T E"]:
    """Returns the standard deviation of the noise on each logit."""
    if self.noise == "fixed":
      scale = self.noise_std / inputs.logits.shape[-1]
      return jnp.full(inputs.logits.shape, scale, jnp.float32)
    return jax.nn.softplus(inputs.features["noise_logits"].astype(jnp.float32))

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    learned = self.noise == "learned"
    logits = inputs.logits.astype(jnp.float32)
    clean = softmax(logits)
    noisy, slot_key = logits, None
    scale = self.noise_scale(inputs)
    if inputs.key is not None:
      slot_key, noise_key = jax.random.split(inputs.key)
      noisy = logits + scale * jax.random.normal(noise_key, logits.shape, jnp.float32)
    probs = softmax(noisy)
    scores = present(logits, noisy)
    expert = choose(noisy, policy.num_selected)
    gate = pick(probs, expert)
    routing = assign(expert, gate, inputs.valid, probs, policy, slot_key, scores=scores)
    importance = _sparse(expert, gate, policy) if learned else clean
    terms = {"importance_loss": losses.importance_loss(importance, inputs.valid)}
    terms["load_loss"] = jnp.zeros(())
    if inputs.key is not None:
      chance = losses.load_probability(
        logits, noisy, scale, policy.num_selected, excluding=learned
      )
      terms["load_loss"] = losses.load_loss(chance, inputs.valid)
    return dataclasses.replace(routing, losses=terms)

  def loss_weights(self) -> dict[str, float]:
    return {"importance_loss": self.importance_weight, "load_loss": self.load_weight}


def _sparse(
  expert: Array, gate: Float[Array, "T K"], policy: SlotPolicy
) -> Float[Array, "T E"]:
  """Returns G(x): gates at their experts before drops, zero elsewhere."""
  if policy.renormalize != "none":
    gate = normalize(gate, policy.renormalize_norm)
  index = jnp.arange(policy.num_experts, dtype=jnp.int32)[None, :]
  dense = jnp.zeros((gate.shape[0], policy.num_experts), jnp.float32)
  for k in range(gate.shape[-1]):
    dense = dense + jnp.where(index == expert[:, k : k + 1], gate[:, k : k + 1], 0.0)
  return dense
