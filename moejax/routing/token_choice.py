"""Token choice: every token picks its experts by its own scores.

Letters: T tokens of one group, E experts, K choices per token.
Sources: Switch, arXiv:2101.03961; GShard, arXiv:2006.16668, algorithm 1; Mixtral,
arXiv:2401.04088; OLMoE, arXiv:2409.02060; DeepSeek-V2, arXiv:2405.04434;
DeepSeek-V3, arXiv:2412.19437. Equations and a table worked by hand are in
docs/routing.md.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.routing.base import RouterInputs, RouterOptions, Routing
from moejax.routing.bias import margins
from moejax.routing.capacity import assign
from moejax.routing.losses import communication_loss, device_loss
from moejax.routing.queueing import normalize
from moejax.routing.scores import choose, limit_to_groups, pick, present, softmax


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
  scores = present(inputs.logits, probs)
  return assign(expert, gate, inputs.valid, probs, options, inputs.key, scores=scores)


def top2(inputs: RouterInputs, options: RouterOptions) -> Routing:
  """GShard: the best expert, and a second one by `options.second_policy`.

  all: always. random: kept with probability min(1, 2 g2), g2 the normalised
  second gate; decided before slots are handed out, so a second choice given up
  takes none. random_raw: the same with g2 the second probability as it is (Praxis
  without its legacy behaviour). sample: the second expert is drawn from the remaining
  probabilities. Without a key (evaluation) all four take the second-best expert.
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
  if options.second_policy in ("random", "random_raw") and draw_key is not None:
    raw = options.second_policy == "random_raw"
    wanted = _keep_second(gate if raw else normalize(gate), draw_key)
  scores = present(inputs.logits, probs)
  return assign(
    expert, gate, inputs.valid, probs, options, slot_key, wanted=wanted, scores=scores
  )


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
  second = jax.lax.stop_gradient(gate[:, 1])
  keep = jax.random.uniform(key, second.shape) < 2.0 * second
  return jnp.stack([jnp.ones_like(keep), keep], axis=-1)


def _limited(scores: Float[Array, "T E"], options: RouterOptions) -> Float[Array, "T E"]:
  return limit_to_groups(
    scores, options.num_expert_groups, options.num_selected_groups, options.group_best
  )


def _present_choices(
  inputs: RouterInputs, expert: Int[Array, "T K"]
) -> Bool[Array, "T K"] | None:
  """Which choices are of experts that take part; None where all do.

  At least K experts always do, but a token's best groups may hold fewer.
  """
  return None if inputs.present is None else inputs.present[expert]


def group_limited(inputs: RouterInputs, options: RouterOptions) -> Routing:
  """Top-k within each token's best groups of experts (DeepSeek-V2).

  Gates are the softmax over ALL experts, times `options.gate_scale`. Its `losses`
  are the device-level and communication balance losses over the groups.
  """
  probs = softmax(inputs.logits)
  scores = _limited(present(inputs.logits, probs), options)
  expert = choose(scores, options.num_selected)
  gate = pick(probs, expert)
  routing = assign(
    expert,
    gate,
    inputs.valid,
    probs,
    options,
    inputs.key,
    wanted=_present_choices(inputs, expert),
    scores=scores,
  )
  groups = options.num_expert_groups
  chosen = routing.stats.chosen
  terms = {
    "device_loss": device_loss(probs, chosen, inputs.valid, groups),
    "communication_loss": communication_loss(probs, expert, inputs.valid, groups),
  }
  return dataclasses.replace(routing, losses=terms)


def _biased_scores(
  inputs: RouterInputs,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
  """Sigmoid scores, and what they are chosen by: the bias added, absent experts -inf."""
  scores = jax.nn.sigmoid(inputs.logits.astype(jnp.float32))
  biased = present(inputs.logits, scores)
  if inputs.bias is not None:
    biased = biased + jax.lax.stop_gradient(inputs.bias)[None, :]
  return scores, biased


def sigmoid_bias(inputs: RouterInputs, options: RouterOptions) -> Routing:
  """Sigmoid scores, balanced by a bias that only choosing sees (DeepSeek-V3).

  The bias has no gradient: `moejax.routing.bias.sign_step` moves it after the
  optimizer step, from the loads of the whole batch. DeepSeek-V3 renormalises the
  gates: `renormalize="before_drop"`. `probs` are the scores divided by their sum
  over all experts, which is what its sequence-wise loss takes.
  """
  scores, biased = _biased_scores(inputs)
  biased = _limited(biased, options)
  expert = choose(biased, options.num_selected)
  probs = scores / jnp.sum(scores, axis=-1, keepdims=True)
  return assign(
    expert,
    pick(scores, expert),
    inputs.valid,
    probs,
    options,
    inputs.key,
    wanted=_present_choices(inputs, expert),
    scores=biased,
    values=scores,
  )


def quantile_bias(inputs: RouterInputs, options: RouterOptions) -> Routing:
  """sigmoid_bias, whose bias goes towards the quantile that balances.

  The choice is that of `sigmoid_bias`; `moejax.routing.bias.quantile_step` moves the
  bias, and needs to know how far an expert's scores spread over tokens.
  """
  routing = sigmoid_bias(inputs, options)
  counted = inputs.valid.astype(jnp.float32)
  scores = jax.lax.stop_gradient(jax.nn.sigmoid(inputs.logits.astype(jnp.float32)))
  moments = jnp.stack([counted @ scores, counted @ jnp.square(scores)])
  stats = dataclasses.replace(routing.stats, moments=moments)
  return dataclasses.replace(routing, stats=stats)


def quantile_balancing(inputs: RouterInputs, options: RouterOptions) -> Routing:
  """sigmoid_bias, whose bias is the quantile that would have balanced the last batch.

  Quantile Balancing (Jianlin Su, kexue.fm/archives/11619). The choice is that of
  `sigmoid_bias`; `moejax.routing.bias.quantile_balance` sets the bias from a histogram,
  which is made in training only.
  """
  routing = sigmoid_bias(inputs, options)
  if inputs.key is None:
    return routing
  _, biased = _biased_scores(inputs)
  counts = margins(biased, inputs.valid, options.num_selected)
  stats = dataclasses.replace(routing.stats, margins=counts)
  return dataclasses.replace(routing, stats=stats)


def dense(inputs: RouterInputs, options: RouterOptions) -> Routing:
  """Every token to every expert by its probability: what sparse routing approximates."""
  options = dataclasses.replace(options, num_selected=options.num_experts)
  return top_k(inputs, options)


def _positions(inputs: RouterInputs) -> Int[Array, "T"]:
  """What a token is counted by in evaluation, the same in generation."""
  if inputs.positions is not None:
    return inputs.positions
  return jnp.arange(inputs.logits.shape[0], dtype=jnp.int32)


def random(inputs: RouterInputs, options: RouterOptions) -> Routing:
  """K experts at random, gates still the router's probabilities. For benchmarks.

  Without a key (evaluation) always the same draw at the same position of a document.
  """
  slot_key, num_experts = None, inputs.logits.shape[-1]
  if inputs.key is None:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), _positions(inputs))
    draws = jax.vmap(lambda key: jax.random.uniform(key, (num_experts,)))(keys)
  else:
    draw_key, slot_key = jax.random.split(inputs.key)
    draws = jax.random.uniform(draw_key, inputs.logits.shape)
  probs = softmax(inputs.logits)
  expert = choose(draws, options.num_selected)
  gate = pick(probs, expert)
  return assign(expert, gate, inputs.valid, probs, options, slot_key, scores=draws)


def forced_balance(inputs: RouterInputs, options: RouterOptions) -> Routing:
  """Experts in turn: token t's k-th choice is (t*K + k) mod E. For benchmarks.

  Perfectly balanced whatever the router says; gates are still its probabilities. t is
  the token's number in its group in training, and in its document in evaluation, where
  the group of a generated token is that token alone.
  """
  probs = softmax(inputs.logits)
  num_tokens, k = inputs.logits.shape[0], options.num_selected
  token = jnp.arange(num_tokens, dtype=jnp.int32)
  if inputs.key is None:
    token = _positions(inputs)
  expert = token[:, None] * k + jnp.arange(k, dtype=jnp.int32)[None, :]
  expert = expert % options.num_experts
  gate = pick(probs, expert)
  return assign(expert, gate, inputs.valid, probs, options, inputs.key)
