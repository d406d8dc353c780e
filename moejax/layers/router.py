"""The router as a module: owns what is learned, and calls the function that decides.

A router of `moejax.routing` is a pure function of `RouterInputs`. What it may look
at beside the logits is made here, once for every router that asks for it
(`RouterSpec.needs`), so a new router needs no module of its own.

Letters: G routing groups, T tokens of a group, D width, E experts, K choices per
token, C slots per expert and group.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.config import MoEConfig
from moejax.errors import ConfigError
from moejax.layers import parameter
from moejax.layers.options import num_present, num_selected, router_options
from moejax.parallel.expert_parallel import over_groups
from moejax.parallel.mesh import on_tokens
from moejax.parallel.platform import target_platform
from moejax.parallel.vocabulary import score
from moejax.routing import scores
from moejax.routing.base import RouterInputs, Routing
from moejax.routing.capacity import capacity_of
from moejax.routing.registry import ROUTERS


class Router(nnx.Module):
  """Scores tokens, and lets the configured router choose."""

  def __init__(self, width: int, moe: MoEConfig, rngs: nnx.Rngs):
    self.config, self.spec = moe, ROUTERS[moe.router]
    self.num_experts = moe.fine_experts
    self.num_selected = num_selected(moe)
    shape, axes = (width, self.num_experts), ("width", "router_expert")
    self.weight = parameter.matrix(
      rngs,
      shape,
      axes,
      fan_in=width,
      scale=moe.router_init_scale,
      trained=self.spec.learned,
    )
    if "noise_logits" in self.spec.needs and moe.noise == "learned":
      # Shazeer et al., appendix A: zeros, so that all experts are equally noisy.
      self.noise = parameter.constant(0.0, shape, axes)
    if "bias" in self.spec.needs:
      # The train step moves it, not the optimizer (Decoder.update_router_bias).
      self.bias = parameter.constant(
        0.0, (self.num_experts,), ("router_expert",), trained=False
      )
    if "slot_logits" in self.spec.needs:
      slots = self._capacity(moe.group_size, moe.capacity_factor) or 1
      self.slots = parameter.matrix(
        rngs, (*shape, slots), (*axes, None), fan_in=width, scale=1.0
      )
      self.slot_scale = parameter.constant(1.0, (1,), (None,))

  def __call__(
    self,
    tokens: Float[Array, "G T D"],
    valid: Bool[Array, "G T"],
    token_ids: Int[Array, "G T"],
    assigned: Int[Array, "G T K"] | None,
    *,
    key: Key[Array, ""] | None,
    capacity_factor: float | None,
    positions: Int[Array, "G T"] | None = None,
    step: Int[Array, ""] | None = None,
    present: Bool[Array, "E"] | None = None,
  ) -> tuple[Float[Array, "G T E"], Routing]:
    """Logits, and who goes where.

    Args:
      tokens: in any dtype; the router computes in float32.
      valid: False for padding.
      token_ids: vocabulary ids.
      assigned: the experts of each token, for routers that read them out of a table.
      key: randomness of this step; None in evaluation, which is deterministic.
      capacity_factor: None is dropless.
      positions: of each token in its document.
      step: optimizer steps taken, in training.
      present: the experts that take part in this step under expert dropout; None draws
        them by `key`.
    """
    moe, keys = self.config, None
    tokens = tokens.astype(jnp.float32)
    seen = tokens
    if key is not None:
      jitter_key, dropout_key, router_key = jax.random.split(key, 3)
      keys = jax.random.split(router_key, tokens.shape[0])
      if moe.jitter:
        seen = scores.jitter(tokens, jitter_key, moe.jitter)
      if moe.expert_dropout and present is None:
        present = present_experts(dropout_key, moe)
    logits = on_tokens(project(seen, self.weight[...]))
    if not self.spec.learned:
      logits = jax.lax.stop_gradient(logits)
    if present is not None:
      logits = jnp.where(present[None, None], logits, scores.ABSENT)
    capacity = self._capacity(tokens.shape[1], capacity_factor)
    inputs = RouterInputs(
      logits=logits,
      valid=valid,
      key=keys,
      token_ids=token_ids,
      assigned=assigned,
      positions=positions,
      noise_logits=project(seen, self.noise[...]) if hasattr(self, "noise") else None,
      slot_logits=self._slot_logits(tokens, capacity) if hasattr(self, "slots") else None,
    )
    same = {
      "bias": self.bias[...] if hasattr(self, "bias") else None,
      "step": step,
      "present": present,
    }
    ranking = "count" if target_platform() == "tpu" else "sort"
    options = dataclasses.replace(router_options(moe, capacity), ranking=ranking)

    def route_all(inputs: RouterInputs, same: dict[str, Array | None]) -> Routing:
      def route(group: RouterInputs) -> Routing:
        routing = self.spec.fn(dataclasses.replace(group, **same), options)
        if same["present"] is None:
          return routing
        here = same["present"].astype(jnp.float32)
        stats = dataclasses.replace(routing.stats, present=here)
        return dataclasses.replace(routing, stats=stats)

      return jax.vmap(route)(inputs)

    return logits, over_groups(route_all, inputs, same, tokens.shape[0])

  def _capacity(self, num_tokens: int, capacity_factor: float | None) -> int | None:
    """C of a group of so many tokens."""
    return capacity_of(
      num_tokens,
      self.num_experts,
      self.num_selected,
      capacity_factor,
      convention=self.config.capacity_convention,
      min_capacity=self.config.min_capacity,
    )

  def _slot_logits(
    self, tokens: Float[Array, "G T D"], capacity: int | None
  ) -> Float[Array, "G T E C"]:
    """Cosine of each token and each slot's vector, times a learned scale.

    Normalised on both sides because the softmax over many tokens collapses
    otherwise when D is large (Soft MoE, arXiv:2308.00951, section 2.3).
    """
    slots = self.slots[...].astype(jnp.float32)
    if slots.shape[-1] != capacity:
      raise ConfigError(
        f"--config.moe.router=soft has {slots.shape[-1]} learned slots per expert, and "
        f"this group size and capacity factor ask for {capacity}. Keep "
        "--config.moe.group_size, capacity_factor and eval_capacity_factor as trained."
      )
    unit = slots / (jnp.linalg.norm(slots, axis=0, keepdims=True) + 1e-6)
    norm = jnp.linalg.norm(tokens, axis=-1, keepdims=True)
    return jnp.einsum(
      "gtd,dec->gtec",
      tokens / (norm + 1e-6),
      self.slot_scale[...][0] * unit,
      precision=jax.lax.Precision.HIGHEST,
    )


def present_experts(key: Key[Array, ""], moe: MoEConfig) -> Bool[Array, "E"]:
  """The experts of a layer that take part in a step: `num_present` at random."""
  dropped = moe.fine_experts - num_present(moe)
  return jax.random.permutation(key, jnp.arange(moe.fine_experts) >= dropped)


def project(
  tokens: Float[Array, "G T D"], weight: Float[Array, "D E"]
) -> Float[Array, "G T E"]:
  """Logits in float32, whatever the compute dtype and the chip's default precision."""
  weight = weight.astype(jnp.float32)
  return score(tokens, weight, cut_over=None, precision=jax.lax.Precision.HIGHEST)
