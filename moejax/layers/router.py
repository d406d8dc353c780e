"""The router module: owns the router's parameters and calls its routing function.

A router of `moejax.routing` declares its parameters and is a pure function of
`RouterInputs`. This module handles both, so that a new router needs no other module.

Letters: G routing groups, T tokens of a group, D width, E experts, K choices per
token, C slots per expert and group.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moejax import parts
from moejax.config import MoEConfig
from moejax.config.router import capacity, make_router, num_present, sizes, slot_policy
from moejax.layers import parameter
from moejax.platform import target_platform
from moejax.routing import scores
from moejax.routing.base import RouterInputs, Routing, SlotPolicy
from moejax.routing.placement import Assignments
from moejax.routing.router import Parameter, Tokens
from moejax.sharding.mesh import on_tokens, over_groups
from moejax.sharding.vocabulary import score
from moejax.types import Constant


class RouterLayer(nnx.Module):
  """Scores tokens and runs the configured router."""

  def __init__(self, width: int, moe: MoEConfig, rngs: nnx.Rngs):
    self._config = Constant(moe)
    self.router = make_router(moe)
    shape, axes = (width, moe.fine_experts), ("width", "router_expert")
    self.weight = parameter.matrix(
      rngs,
      shape,
      axes,
      fan_in=width,
      scale=moe.router_init_scale,
      trained=self.router.learned,
    )
    bias_shape, bias_axes = (moe.fine_experts,), ("router_expert",)
    self.logit_bias = (
      parameter.constant(0.0, bias_shape, bias_axes) if moe.router_bias else None
    )
    self._declare_pruned(width, moe, rngs)
    declared = self.router.parameters(sizes(moe, width, moe.group_size))
    self._declared = Constant(declared)
    for name, about in declared.items():
      # Attribute names are the names in checkpoints.
      setattr(self, name, _make(rngs, about))

  def _declare_pruned(self, width: int, moe: MoEConfig, rngs: nnx.Rngs) -> None:
    rows, axes = moe.pruned_rows, (None,)
    if not rows:
      return
    self.pruned = parameter.matrix(
      rngs, (width, rows), ("width", *axes), fan_in=width, scale=moe.router_init_scale
    )
    self.pruned_bias = parameter.constant(0.0, (rows,), axes) if moe.router_bias else None

  @property
  def parameter_names(self) -> tuple[str, ...]:
    """Names of the router's own parameters."""
    return tuple(self._declared.value)

  @parts.of_part(parts.ROUTER)
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
    """Returns the logits and the routing.

    Args:
      tokens: in any dtype; the router computes in float32.
      valid: False for padding.
      token_ids: vocabulary ids.
      assigned: the experts of each token, for routers that look them up in a table.
      key: PRNG key of this step; None in evaluation, which is deterministic.
      capacity_factor: None means dropless.
      positions: position of each token in its document.
      step: optimizer steps taken, in training.
      present: the experts that take part in this step under expert dropout; None samples
        them with `key`.
    """
    moe, declared, keys = self._config.value, self._declared.value, None
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
    if self.logit_bias is not None:
      logits = logits + self.logit_bias[...].astype(jnp.float32)[None, None]
    if not self.router.learned:
      logits = jax.lax.stop_gradient(logits)
    if present is not None:
      logits = jnp.where(present[None, None], logits, scores.ABSENT)
    policy = slot_policy(moe, capacity(moe, tokens.shape[1], capacity_factor))
    ranking = "count" if target_platform() == "tpu" else "sort"
    policy = dataclasses.replace(policy, ranking=ranking)
    params = {name: getattr(self, name)[...] for name in declared}
    views = Tokens(clean=tokens, seen=seen, project=project)
    mass = self._mass(seen, logits)
    inputs = RouterInputs(
      logits=logits,
      valid=valid,
      key=keys,
      token_ids=token_ids,
      assigned=assigned,
      positions=positions,
      features=self.router.features(views, params, policy),
    )
    # Inputs shared by all groups are not mapped over.
    same = {
      "params": {n: v for n, v in params.items() if declared[n].by_group},
      "step": step,
      "present": present,
    }

    def route_all(mapped: Any, same: dict[str, Any]) -> Routing:
      def route(group: RouterInputs, mass: Any) -> Routing:
        return self._route(dataclasses.replace(group, **same), policy, mass)

      return jax.vmap(route)(*mapped)

    return logits, over_groups(route_all, (inputs, mass), same, tokens.shape[0])

  def _route(
    self, group: RouterInputs, policy: SlotPolicy, mass: Float[Array, "T"] | None
  ) -> Routing:
    """Routes one group, and adds the statistics common to all routers."""
    routing = self.router(group, policy)
    if mass is not None:
      routing = _weighted(routing, mass)
    counted = {}
    if group.key is not None:
      counted = _confidence(group.logits, group.valid, self.router.by_sigmoid)
    if group.present is not None:
      counted["present"] = group.present.astype(jnp.float32)
    stats = dataclasses.replace(routing.stats, **counted)
    return dataclasses.replace(routing, stats=stats)

  def _mass(
    self, seen: Float[Array, "G T D"], logits: Float[Array, "G T E"]
  ) -> Float[Array, "G T"] | None:
    """Returns the total probability of rows with experts; None without pruned rows."""
    if not self._config.value.pruned_rows:
      return None
    others = on_tokens(project(seen, self.pruned[...]))
    if self.pruned_bias is not None:
      others = others + self.pruned_bias[...].astype(jnp.float32)[None, None]
    lse = jax.nn.logsumexp
    return jax.nn.sigmoid(lse(logits, axis=-1) - lse(others, axis=-1))


def _weighted(routing: Routing, mass: Float[Array, "T"]) -> Routing:
  """Multiplies a token's gates by the total probability of the experts."""
  placement = routing.placement
  assert isinstance(placement, Assignments)
  gate = placement.gate * mass[placement.token]
  placement = dataclasses.replace(placement, gate=gate)
  return dataclasses.replace(routing, placement=placement)


def _confidence(
  logits: Float[Array, "T E"], valid: Bool[Array, "T"], by_sigmoid: bool
) -> dict[str, Float[Array, ""]]:
  """Returns the router's confidence on one group, as sums of `RouterStats`."""
  # Behind a barrier: fusing this code with the router would change the router's rounding.
  logits = jax.lax.optimization_barrier(jax.lax.stop_gradient(logits))
  counted = valid.astype(jnp.float32)
  # Experts left out of the step have a logit far below any other.
  size = jnp.max(jnp.where(logits > scores.ABSENT, jnp.abs(logits), 0.0), axis=-1)
  highest = jnp.max(logits, axis=-1)
  if by_sigmoid:
    score = jax.nn.sigmoid(highest)
  else:
    score = jnp.exp(highest - jax.nn.logsumexp(logits, axis=-1))
  return {"top_gate": counted @ score, "top_logit": counted @ size}


def _make(rngs: nnx.Rngs, declared: Parameter) -> nnx.Param:
  if declared.fan_in is None:
    return parameter.constant(
      declared.value, declared.shape, declared.axes, trained=declared.trained
    )
  return parameter.matrix(
    rngs,
    declared.shape,
    declared.axes,
    fan_in=declared.fan_in,
    trained=declared.trained,
  )


def present_experts(key: Key[Array, ""], moe: MoEConfig) -> Bool[Array, "E"]:
  """Samples the experts of a layer that take part in a step: `num_present` of them."""
  dropped = moe.fine_experts - num_present(moe)
  return jax.random.permutation(key, jnp.arange(moe.fine_experts) >= dropped)


def project(
  tokens: Float[Array, "G T D"], weight: Float[Array, "D E"]
) -> Float[Array, "G T E"]:
  """Returns float32 logits, for any compute dtype and default matmul precision."""
  weight = weight.astype(jnp.float32)
  return score(tokens, weight, cut_over=None, precision=jax.lax.Precision.HIGHEST)
