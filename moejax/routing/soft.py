"""Soft MoE: every slot holds a weighted mean of all tokens, every token of all slots.

Nothing is dropped and everything is differentiable; the weights are dense by nature.
It mixes all tokens of a group, so it leaks the future.

Letters: T tokens of one group, E experts, C slots per expert.
Source: Puigcerver et al. 2023, arXiv:2308.00951, section 2.1.
"""

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError
from moejax.routing.base import RouterInputs, RouterOptions, RouterStats, Routing, entropy


def soft(inputs: RouterInputs, options: RouterOptions) -> Routing:
  """Dispatch: softmax of slot_logits over tokens. Combine: softmax over all slots.

  Padding is in no slot and gets nothing back. `probs` is the combine weight of each
  expert's slots together; load counts the slots.
  """
  if inputs.slot_logits is None or options.capacity is None:
    raise ConfigError(
      "--config.moe.router=soft needs a number of slots: give "
      "--config.moe.capacity_factor a number, not none."
    )
  logits = inputs.slot_logits.astype(jnp.float32)
  num_tokens, num_experts, capacity = logits.shape
  valid = inputs.valid[:, None, None]
  # A large negative number, not -inf: a group of padding alone must not become NaN.
  dispatch = jax.nn.softmax(jnp.where(valid, logits, -1e30), axis=0)
  dispatch = jnp.where(valid, dispatch, 0.0)
  combine = jax.nn.softmax(logits.reshape(num_tokens, -1), axis=-1)
  combine = jnp.where(valid, combine.reshape(logits.shape), 0.0)
  probs = jnp.sum(combine, axis=-1)
  seen = jax.lax.stop_gradient(probs)
  slots = jnp.full((num_experts,), capacity, jnp.int32)
  none = jnp.zeros((0,), jnp.int32)
  stats = RouterStats(
    num_valid=jnp.sum(inputs.valid.astype(jnp.float32)),
    chosen=slots.astype(jnp.float32),
    load=slots.astype(jnp.float32),
    importance=jnp.sum(seen, axis=0),
    entropy=jnp.sum(entropy(seen)),
    dropped_tokens=jnp.zeros(()),
  )
  return Routing(
    token=none,
    expert=none,
    slot=none,
    gate=jnp.zeros((0,), jnp.float32),
    kept=jnp.zeros((0,), bool),
    order=none,
    load=slots,
    probs=probs,
    stats=stats,
    dense_dispatch=dispatch,
    dense_combine=combine,
    capacity=capacity,
    num_selected=None,
  )
