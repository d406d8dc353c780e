"""Baseline routers: all experts, random experts, and perfect balance.

Letters: T tokens of one group, E experts, K choices per token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.routing.base import RouterInputs, Routing, SlotPolicy
from moejax.routing.capacity import assign
from moejax.routing.router import Router
from moejax.routing.scores import choose, pick, softmax
from moejax.routing.token_choice import TopK


class Dense(TopK):
  """Sends every token to every expert: what sparse routing approximates."""

  name = "dense"
  summary = "every token to every expert: what sparse routing approximates"
  by_logits = False

  def selected(self, num_experts: int, num_selected: int) -> int:
    del num_selected
    return num_experts

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    policy = dataclasses.replace(policy, num_selected=policy.num_experts)
    return super().__call__(inputs, policy)


def _positions(inputs: RouterInputs) -> Int[Array, "T"]:
  """Returns each token's position in its document, or in the group if unknown."""
  if inputs.positions is not None:
    return inputs.positions
  return jnp.arange(inputs.logits.shape[0], dtype=jnp.int32)


class Random(Router):
  """Chooses K experts at random; gates are still the router's probabilities.

  Without a key (evaluation) the draw depends only on the position in the document.
  """

  name = "random"
  summary = "K experts at random, for benchmarks"
  needs_key = True
  by_logits = False

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    slot_key, num_experts = None, inputs.logits.shape[-1]
    if inputs.key is None:
      fold = jax.vmap(jax.random.fold_in, (None, 0))
      keys = fold(jax.random.key(0), _positions(inputs))
      draws = jax.vmap(lambda key: jax.random.uniform(key, (num_experts,)))(keys)
    else:
      draw_key, slot_key = jax.random.split(inputs.key)
      draws = jax.random.uniform(draw_key, inputs.logits.shape)
    probs = softmax(inputs.logits)
    expert = choose(draws, policy.num_selected)
    gate = pick(probs, expert)
    return assign(expert, gate, inputs.valid, probs, policy, slot_key, scores=draws)


class ForcedBalance(Router):
  """Assigns experts in turn: token t's k-th choice is (t*K + k) mod E.

  Perfectly balanced for any logits; gates are still the router's probabilities. t is
  the token's index in its group in training, and in its document in evaluation, where
  the group of a generated token is that token alone.
  """

  name = "forced_balance"
  summary = "experts in turn, perfectly balanced, for benchmarks"
  needs_key = True
  by_logits = False

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    probs = softmax(inputs.logits)
    num_tokens, k = inputs.logits.shape[0], policy.num_selected
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    if inputs.key is None:
      token = _positions(inputs)
    expert = token[:, None] * k + jnp.arange(k, dtype=jnp.int32)[None, :]
    expert = expert % policy.num_experts
    gate = pick(probs, expert)
    return assign(expert, gate, inputs.valid, probs, policy, inputs.key)
