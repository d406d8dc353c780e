"""Token choice: every token picks its experts by its own scores.

Letters: T tokens of one group, E experts, K choices per token.
Sources: Switch, arXiv:2101.03961; GShard, arXiv:2006.16668, algorithm 1; Mixtral,
arXiv:2401.04088; OLMoE, arXiv:2409.02060. Equations and a worked example are in
docs/routing.md.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moejax.options import option
from moejax.routing.base import RouterInputs, Routing, SlotPolicy
from moejax.routing.capacity import assign
from moejax.routing.queueing import normalize
from moejax.routing.router import Router
from moejax.routing.scores import choose, pick, present, softmax


class TopK(Router):
  """Sends each token to its K most probable experts.

  With `renormalize="before_drop"` the gates equal a softmax over the K chosen
  logits (Mixtral); with "none" they are probabilities over all E (OLMoE).
  """

  name = "top_k"
  summary = "K most probable experts, gates raw or renormalised (Mixtral, OLMoE)"
  gates_are_probabilities = True

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    probs = softmax(inputs.logits)
    expert = choose(inputs.logits, policy.num_selected)
    gate = pick(probs, expert)
    scores = present(inputs.logits, probs)
    return assign(expert, gate, inputs.valid, probs, policy, inputs.key, scores=scores)


class Switch(TopK):
  """Sends each token to its most probable expert, weighted by that probability."""

  name = "switch"
  summary = "top-1, gate = probability (Switch)"
  fixed_selected = 1

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    # The gate must stay the probability: scaled to 1 it carries no gradient.
    policy = dataclasses.replace(policy, num_selected=1, renormalize="none")
    return super().__call__(inputs, policy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Top2(Router):
  """Chooses the best expert, and a second one by `second_policy` (GShard).

  all: always. random: kept with probability min(1, 2 g2), g2 the normalised second
  gate; decided before slots are assigned, so a dropped second choice takes none.
  random_raw: the same with g2 the unnormalised second probability (Praxis without its
  legacy behaviour). sample: the second expert is drawn from the remaining
  probabilities. Without a key (evaluation) all four take the second-best expert.
  """

  name = "top2"
  summary = "best expert and a second one: always, at random or sampled (GShard)"
  needs_key = True
  gates_are_probabilities = True
  fixed_selected = 2

  second_policy: Literal["all", "random", "random_raw", "sample"] = option(
    "all",
    "the second expert: always (all), with probability min(1, 2*g2), g2 its normalised "
    "gate (random) or its probability (random_raw), or drawn from the rest (sample)",
  )

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    policy = dataclasses.replace(policy, num_selected=2)
    probs = softmax(inputs.logits)
    slot_key = draw_key = None
    if inputs.key is not None:
      slot_key, draw_key = jax.random.split(inputs.key)
    if self.second_policy == "sample" and draw_key is not None:
      noise = jax.random.gumbel(draw_key, inputs.logits.shape, jnp.float32)
      expert = choose_with_sampled_second(inputs.logits, noise)
    else:
      expert = choose(inputs.logits, 2)
    gate = pick(probs, expert)
    wanted = None
    if self.second_policy in ("random", "random_raw") and draw_key is not None:
      raw = self.second_policy == "random_raw"
      wanted = _keep_second(gate if raw else normalize(gate), draw_key)
    scores = present(inputs.logits, probs)
    return assign(
      expert, gate, inputs.valid, probs, policy, slot_key, wanted=wanted, scores=scores
    )


def choose_with_sampled_second(
  logits: Float[Array, "T E"], noise: Float[Array, "T E"]
) -> Int[Array, "T 2"]:
  """Chooses the best expert, and samples another in proportion to probability.

  Args:
    noise: standard Gumbel samples; the argmax of logit + noise is such a sample.

  """
  first = choose(logits, 1)
  index = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]
  second = choose(jnp.where(index == first, -jnp.inf, logits + noise), 1)
  return jnp.concatenate([first, second], axis=-1)


def _keep_second(gate: Float[Array, "T 2"], key: Key[Array, ""]) -> Array:
  second = jax.lax.stop_gradient(gate[:, 1])
  keep = jax.random.uniform(key, second.shape) < 2.0 * second
  return jnp.stack([jnp.ones_like(keep), keep], axis=-1)
