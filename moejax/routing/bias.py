"""Balancing by a selection-only bias: the routers, and how a step updates the bias.

The router keeps one number per expert, which is added to the scores for selection and
never enters a gate or a gradient. After each optimizer step it is updated once from the
statistics of the whole batch (`RouterStats` summed over groups, devices and
microbatches). It does not change in evaluation.

Letters: T tokens, E experts, K choices per token, l any leading axes of layers.
Sources: DeepSeek-V3, arXiv:2412.19437, section 2.1.2 (`SigmoidBias`); docs/routing.md
derives the step of `QuantileBias`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.options import Range, option
from moejax.routing.base import RouterInputs, RouterStats, Routing, SlotPolicy
from moejax.routing.capacity import assign
from moejax.routing.expert_groups import GroupedRouter, present_choices
from moejax.routing.losses import mean_load, updated_bias
from moejax.routing.router import Parameter, Params, Sizes
from moejax.routing.scores import TINY, choose, pick, present, ratio, softmax

_LEAST_SPREAD = 1e-4
"""Lower bound on the std of an expert's scores: equal scores still move a bias."""


BIAS = "bias"
"""Name of the parameter of `bias_parameter`."""


def bias_parameter(sizes: Sizes) -> dict[str, Parameter]:
  """Declares one number per expert, updated by the train step, not by the optimizer."""
  shape = (sizes.num_experts,)
  return {BIAS: Parameter(shape=shape, axes=("router_expert",), trained=False)}


def biased_scores(
  inputs: RouterInputs,
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
  """Returns sigmoid scores, and selection scores: biased, -inf for absent experts."""
  scores = jax.nn.sigmoid(inputs.logits.astype(jnp.float32))
  biased = present(inputs.logits, scores)
  if BIAS in inputs.params:
    biased = biased + jax.lax.stop_gradient(inputs.params[BIAS])[None, :]
  return scores, biased


def route_biased(
  inputs: RouterInputs,
  policy: SlotPolicy,
  scores: Float[Array, "T E"],
  biased: Float[Array, "T E"],
) -> Routing:
  """Routes to the K best experts by biased score; gates are the unbiased scores.

  `probs` are the scores divided by their sum over all experts, as in DeepSeek-V3's
  sequence-wise loss. Of logits far below zero, sigmoids are exponentials, and probs a
  softmax.
  """
  expert = choose(biased, policy.num_selected)
  total = jnp.sum(scores, axis=-1, keepdims=True)
  far = jnp.broadcast_to(total < TINY, scores.shape)
  probs = jnp.where(far, softmax(inputs.logits), ratio(scores, total))
  return assign(
    expert,
    pick(scores, expert),
    inputs.valid,
    probs,
    policy,
    inputs.key,
    wanted=present_choices(inputs, expert),
    scores=biased,
    values=scores,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidBias(GroupedRouter):
  """Sigmoid scores, balanced by a selection-only bias (DeepSeek-V3).

  The bias has no gradient: a step raises it by a fixed rate where the load was below
  the mean and lowers it where above. DeepSeek-V3 renormalises the gates:
  `renormalize="before_drop"`.
  """

  name = "sigmoid_bias"
  summary = "sigmoid scores balanced by a selection-only bias (DeepSeek-V3)"
  by_sigmoid = True
  balancer = "bias_update_rate"
  selection_bias = BIAS

  bias_update_rate: float = option(
    0.001,
    "how far a step moves each expert's bias",
    Range(0, 10, "0 leaves the bias at zero", why_high="scores lie between 0 and 1"),
  )

  def parameters(self, sizes: Sizes) -> dict[str, Parameter]:
    return bias_parameter(sizes)

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    scores, biased = biased_scores(inputs)
    return route_biased(inputs, policy, scores, self.limited(biased))

  def update(self, params: Params, stats: RouterStats) -> dict[str, Float[Array, "..."]]:
    bias, rate = params[BIAS], self.bias_update_rate
    return {BIAS: updated_bias(bias, stats.chosen, rate, _present(stats))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantileBias(GroupedRouter):
  """`SigmoidBias` with a bias that moves towards the quantile that balances the load.

  The distance depends on the spread of an expert's scores over tokens; their first two
  moments are summed for `quantile_step`.
  """

  name = "quantile_bias"
  summary = "sigmoid_bias whose bias steps towards an estimated balancing quantile"
  by_sigmoid = True
  balancer = "quantile_rate"
  selection_bias = BIAS

  quantile_rate: float = option(
    0.2,
    "fraction of the estimated distance to balance per step",
    Range(0, 10, "0 leaves the bias at zero", why_high="1 goes all the way to balance"),
  )

  def parameters(self, sizes: Sizes) -> dict[str, Parameter]:
    return bias_parameter(sizes)

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    scores, biased = biased_scores(inputs)
    routing = route_biased(inputs, policy, scores, self.limited(biased))
    counted, seen = inputs.valid.astype(jnp.float32), jax.lax.stop_gradient(scores)
    moments = jnp.stack([counted @ seen, counted @ jnp.square(seen)])
    stats = dataclasses.replace(routing.stats, extra={"moments": moments})
    return dataclasses.replace(routing, stats=stats)

  def update(self, params: Params, stats: RouterStats) -> dict[str, Float[Array, "..."]]:
    return {BIAS: quantile_step(params[BIAS], stats, self.quantile_rate)}


def _present(stats: RouterStats) -> Bool[Array, "*l E"] | None:
  return None if stats.present is None else stats.present > 0


def wanted_load(stats: RouterStats) -> Float[Array, "*l 1"]:
  """Returns the assignments per expert at balance, among experts that took part."""
  present = _present(stats)
  if present is None:
    return jnp.mean(stats.chosen, axis=-1, keepdims=True)
  return mean_load(stats.chosen, present)


def settled(
  bias: Float[Array, "*l E"], moved: Float[Array, "*l E"], stats: RouterStats
) -> Float[Array, "*l E"]:
  """Returns the new biases, shifted to mean zero; the old ones if no token is valid."""
  present = _present(stats)
  if present is not None:
    moved = jnp.where(present, moved, bias)
  moved = moved - jnp.mean(moved, axis=-1, keepdims=True)
  return jnp.where(stats.num_valid[..., None] > 0, moved, bias)


def quantile_step(
  bias: Float[Array, "*l E"], stats: RouterStats, rate: float
) -> Float[Array, "*l E"]:
  """Moves biases a fraction of the way to where every expert would get an equal share.

  An expert is chosen by the tokens whose score exceeds some threshold, so its share of
  tokens f is a tail of its score distribution. If that were normal with standard
  deviation s, moving the bias by s * (z(K/E) - z(f)), z the normal quantile, would
  make the share K/E. For any distribution the step is zero at balance (up to
  rounding) and has the sign of the error; only its length is approximate, and is
  scaled by `rate`. Biases keep mean zero.
  """
  moments = stats.extra["moments"]
  tokens = jnp.maximum(stats.num_valid, 1.0)[..., None]
  first, second = moments[..., 0, :] / tokens, moments[..., 1, :] / tokens
  spread = jnp.sqrt(jnp.maximum(second - first * first, _LEAST_SPREAD**2))
  # Keeps shares away from 0 and 1, where the quantile is infinite: half a token.
  least = 0.5 / tokens
  share = jnp.clip(stats.chosen / tokens, least, 1.0 - least)
  target = jnp.clip(wanted_load(stats) / tokens, least, 1.0 - least)
  quantile = jax.scipy.special.ndtri
  moved = bias + rate * spread * (quantile(target) - quantile(share))
  return settled(bias, moved, stats)
