"""Token choice: every token picks its experts by its own scores.

Letters: T tokens of one group, E experts, K choices per token.
Sources: Switch, arXiv:2101.03961; GShard, arXiv:2006.16668, algorithm 1; Mixtral,
arXiv:2401.04088; OLMoE, arXiv:2409.02060. Equations and a table worked by hand
are in docs/routing.md.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moejax.routing.base import RouterInputs, RouterOptions, Routing
from moejax.routing.capacity import assign
from moejax.routing.scores import choose, pick, softmax


def switch(inputs: RouterInputs, options: RouterOptions) -> Routing:
  """Each token goes to its most probable expert, weighted by that probability."""
  # The gate must stay the probability: scaled to 1 it carries no gradient to the router.
  return top_k(inputs, dataclasses.replace(options, num_selected=1, renormalize="none"))


def top_k(inputs: RouterInputs, options: RouterOptions) -> Routing:
  """Each token goes to its K most probable experts.

  With `renormalize="before_drop"` the gates equal a softmax over the K chosen
  logits (Mixtral); with "none" they are probabilities over all E (OLMoE).
  """
  probs = softmax(inputs.logits)
  expert = choose(inputs.logits, options.num_selected)
  gate = pick(probs, expert)
  return assign(expert, gate, inputs.valid, probs, options, inputs.key)


def top2(inputs: RouterInputs, options: RouterOptions) -> Routing:
  """GShard: the best expert, and a second one by `options.second_policy`.

  all: always. random: kept with probability min(1, 2 g2), g2 the normalised
  second gate; decided before slots are handed out, so a second choice given up
  takes none. sample: the second expert is drawn from the remaining probabilities.
  Without a key (evaluation) all three take the second-best expert.
  """
  options = dataclasses.replace(options, num_selected=2)
  probs = softmax(inputs.logits)
  slot_key = draw_key = None
  if inputs.key is not None:
    slot_key, draw_key = jax.random.split(inputs.key)
  if options.second_policy == "sample" and draw_key is not None:
    noise = jax.random.gumbel(draw_key, inputs.logits.shape, jnp.float32)
    expert = choose_with_sampled_second(inputs.logits, noise)
  else:
    expert = choose(inputs.logits, 2)
  gate = pick(probs, expert)
  wanted = None
  if options.second_policy == "random" and draw_key is not None:
    wanted = _keep_second(gate, draw_key)
  return assign(expert, gate, inputs.valid, probs, options, slot_key, wanted=wanted)


def choose_with_sampled_second(
  logits: Float[Array, "T E"], noise: Float[Array, "T E"]
) -> Int[Array, "T 2"]:
  """The best expert, and one drawn from the others in proportion to probability.

  Args:
    noise: standard Gumbel draws; the largest of logit + noise is such a draw.
  """
  first = choose(logits, 1)
  index = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]
  second = choose(jnp.where(index == first, -jnp.inf, logits + noise), 1)
  return jnp.concatenate([first, second], axis=-1)


def _keep_second(gate: Float[Array, "T 2"], key: Key[Array, ""]) -> Array:
  second = jax.lax.stop_gradient(gate[:, 1] / jnp.maximum(jnp.sum(gate, -1), 1e-30))
  keep = jax.random.uniform(key, second.shape) < 2.0 * second
  return jnp.stack([jnp.ones_like(keep), keep], axis=-1)
