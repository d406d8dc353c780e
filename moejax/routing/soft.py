"""Soft MoE: each slot is a weighted mean of all tokens, each output of all slots.

Nothing is dropped and everything is differentiable; the weights are inherently dense.
It mixes all tokens of a group, so it leaks the future.

Letters: T tokens of one group, E experts, C slots per expert.
Source: Puigcerver et al. 2023, arXiv:2308.00951, section 2.1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.errors import ConfigError
from moejax.routing.base import RouterInputs, RouterStats, Routing, SlotPolicy
from moejax.routing.placement import Mixture
from moejax.routing.router import Parameter, Params, Router, Sizes, Tokens
from moejax.routing.scores import entropy


class Soft(Router):
  """Dispatch: softmax of slot_logits over tokens. Combine: softmax over all slots.

  Padding enters no slot and gets no output. `probs` is the summed combine weight of
  each expert's slots; load counts the slots.
  """

  name = "soft"
  summary = "slots are weighted means of all tokens (Soft MoE); einsum dispatcher only"
  causal = False
  by_logits = False
  needs_capacity = True
  token_choice = False
  fixed_slots = True
  mixes = True

  def parameters(self, sizes: Sizes) -> dict[str, Parameter]:
    shape = (sizes.width, sizes.num_experts, sizes.capacity or 1)
    axes = ("width", "router_expert", None)
    return {
      "slots": Parameter(shape=shape, axes=axes, fan_in=sizes.width, by_group=False),
      "slot_scale": Parameter(shape=(1,), axes=(None,), value=1.0, by_group=False),
    }

  def features(
    self, tokens: Tokens, params: Params, policy: SlotPolicy
  ) -> dict[str, Float[Array, "G T ..."]]:
    """Returns the cosine of each token and each slot vector, times a learned scale.

    Both are normalised, because otherwise the softmax over many tokens collapses for
    large D (section 2.3).
    """
    slots = params["slots"].astype(jnp.float32)
    if slots.shape[-1] != policy.capacity:
      raise ConfigError(
        f"--config.moe.router=soft has {slots.shape[-1]} learned slots per expert, but "
        f"this group size and capacity factor ask for {policy.capacity}. Keep "
        "--config.moe.group_size, capacity_factor and eval_capacity_factor as trained."
      )
    unit = slots / (jnp.linalg.norm(slots, axis=0, keepdims=True) + 1e-6)
    norm = jnp.linalg.norm(tokens.clean, axis=-1, keepdims=True)
    slot_logits = jnp.einsum(
      "gtd,dec->gtec",
      tokens.clean / (norm + 1e-6),
      params["slot_scale"][0] * unit,
      precision=jax.lax.Precision.HIGHEST,
    )
    return {"slot_logits": slot_logits}

  def macs(self, sizes: Sizes) -> float:
    """Returns the multiply-adds per token, including the dispatch and combine einsums."""
    slots = sizes.num_experts * (sizes.capacity or 1)
    return super().macs(sizes) + 3 * sizes.width * slots

  def experts_per_token(self, sizes: Sizes) -> float:
    return sizes.num_experts * (sizes.capacity or 1) / sizes.num_tokens

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    if "slot_logits" not in inputs.features or policy.capacity is None:
      raise ConfigError(
        "--config.moe.router=soft needs a number of slots: give "
        "--config.moe.capacity_factor a number, not none."
      )
    logits = inputs.features["slot_logits"].astype(jnp.float32)
    num_tokens, num_experts, capacity = logits.shape
    valid = inputs.valid[:, None, None]
    # A large negative number, not -inf: a group of only padding must not become NaN.
    dispatch = jax.nn.softmax(jnp.where(valid, logits, -1e30), axis=0)
    dispatch = jnp.where(valid, dispatch, 0.0)
    combine = jax.nn.softmax(logits.reshape(num_tokens, -1), axis=-1)
    combine = jnp.where(valid, combine.reshape(logits.shape), 0.0)
    probs = jnp.sum(combine, axis=-1)
    seen = jax.lax.stop_gradient(probs)
    slots = jnp.full((num_experts,), capacity, jnp.float32)
    stats = RouterStats(
      num_valid=jnp.sum(inputs.valid.astype(jnp.float32)),
      chosen=slots,
      load=slots,
      importance=jnp.sum(seen, axis=0),
      entropy=jnp.sum(entropy(seen)),
      dropped_tokens=jnp.zeros(()),
    )
    return Routing(
      placement=Mixture(dispatch=dispatch, combine=combine), probs=probs, stats=stats
    )
