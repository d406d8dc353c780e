"""Expert choice: every expert picks its C best tokens.

Perfectly balanced and never over capacity; a token may get no expert, or all of
them. The choice depends on later tokens, so it leaks the future in a causal model.

Letters: T tokens of one group, E experts, C slots per expert, N = E*C assignments.
Source: Zhou et al. 2022, arXiv:2202.09368, section 3.2.
"""

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError
from moejax.routing.base import RouterInputs, Routing, SlotPolicy
from moejax.routing.capacity import make_stats
from moejax.routing.placement import Assignments
from moejax.routing.router import Router
from moejax.routing.scores import softmax


class ExpertChoice(Router):
  """Slot c of expert e holds its c-th most probable token; gate = that probability.

  The capacity factor is the mean number of experts per token divided by K. Slots that
  only padding could fill stay empty.
  """

  name = "expert_choice"
  summary = "every expert picks its C most probable tokens; leaks the future"
  causal = False
  needs_capacity = True
  token_choice = False
  by_logits = False
  reads = ("gate_scale",)

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    if policy.capacity is None:
      raise ConfigError(
        "--config.moe.capacity_factor=none with --config.moe.router=expert_choice: an "
        "expert picks as many tokens as it has slots. Give a number."
      )
    probs = softmax(inputs.logits)
    num_tokens, num_experts, capacity = *probs.shape, policy.capacity
    scores = jnp.where(inputs.valid[:, None], probs, -1.0).T
    gate, token = jax.lax.top_k(scores, capacity)
    kept = gate >= 0
    gate = jnp.where(kept, gate, 0.0) * policy.gate_scale
    token = token.astype(jnp.int32)
    slot = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32)[None, :], kept.shape)
    expert = jnp.arange(num_experts, dtype=jnp.int32)[:, None]
    load = jnp.sum(kept.astype(jnp.int32), axis=-1)
    # Every expert keeps the same number of tokens, min(valid tokens, C). So the run of
    # expert e starts at e * load, and the empty slots follow all runs.
    full, index = load[0], jnp.arange(num_experts * capacity, dtype=jnp.int32)
    total = full * num_experts
    empty = jnp.maximum(capacity - full, 1)
    here, beyond = jnp.maximum(full, 1), index - total
    order = jnp.where(
      index < total,
      index // here * capacity + index % here,
      beyond // empty * capacity + full + beyond % empty,
    )
    served = jnp.zeros(num_tokens, bool).at[token.reshape(-1)].max(kept.reshape(-1))
    placement = Assignments(
      token=token.reshape(-1),
      expert=jnp.broadcast_to(expert, kept.shape).reshape(-1),
      slot=jnp.where(kept, slot, capacity).reshape(-1),
      gate=gate.reshape(-1),
      kept=kept.reshape(-1),
      order=order,
      load=load,
      num_tokens=num_tokens,
      capacity=capacity,
      num_selected=None,
    )
    stats = make_stats(probs, inputs.valid, load, load, served)
    return Routing(placement=placement, probs=probs, stats=stats)
