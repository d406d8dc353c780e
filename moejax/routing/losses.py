"""Router losses: they encourage balance and discourage large logits.

Each loss is for ONE group; the layer weights groups by their valid tokens.

Letters: T tokens of one group, E experts, K choices per token.
Sources: Switch, arXiv:2101.03961, equations 4 to 6; GShard, arXiv:2006.16668,
section 2.2; ST-MoE, arXiv:2202.08906, equation 5 (z-loss); Shazeer et al. 2017,
arXiv:1701.06538, section 4 and appendix A (importance, load); V-MoE,
arXiv:2106.05974, appendix A; DeepSeek-V2, arXiv:2405.04434, section 2.1.3 (device
and communication balance); DeepSeek-V3, arXiv:2412.19437, section 2.1.2 (bias).
See docs/conventions.md for how each codebase scales them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.routing.base import Routing
from moejax.routing.scores import entropy, ratio


def _mean_over_valid(
  values: Float[Array, "T *rest"], valid: Bool[Array, "T"]
) -> Float[Array, "*rest"]:
  weight = valid.astype(jnp.float32)
  total = jnp.maximum(jnp.sum(weight), 1.0)
  return jnp.tensordot(weight, values, axes=1) / total


def balance_loss(
  probs: Float[Array, "T E"],
  chosen: Float[Array, "E"],
  valid: Bool[Array, "T"],
  num_present: int | None = None,
) -> Float[Array, ""]:
  """Returns E * sum_e f_e P_e: 1 at balance for any K, E if one expert takes all.

  f_e is the expert's share of the requested assignments (before capacity, since an
  overloaded expert would look balanced after it); P_e the mean probability over
  valid tokens. Only P has a gradient. A group of only padding gives 0.

  Args:
    probs: the router's probabilities.
    chosen: assignments requested, per expert.
    valid: False for padding.
    num_present: experts that take part in the step (expert dropout), used in place of
      E: balance is among those.
  """
  num_experts = num_present or probs.shape[-1]
  fraction = jax.lax.stop_gradient(chosen) / jnp.maximum(jnp.sum(chosen), 1.0)
  return num_experts * jnp.sum(fraction * _mean_over_valid(probs, valid))


def first_choices(routing: Routing, valid: Bool[Array, "T"]) -> Float[Array, "E"]:
  """Counts valid tokens per expert by FIRST choice only, for `balance_loss`.

  Counted before overflow moves any. GShard's original loss uses these counts; V-MoE,
  Praxis, AXLearn's Top2, DeepSpeed's top-2 and Tutel follow it.
  """
  first = routing.first
  assert first is not None, "tokens make no first choice under this router"
  index = jnp.arange(routing.probs.shape[-1], dtype=jnp.int32)[None, :]
  return jnp.sum(((first[:, None] == index) & valid[:, None]).astype(jnp.float32), axis=0)


def z_loss(logits: Float[Array, "T E"], valid: Bool[Array, "T"]) -> Float[Array, ""]:
  """Returns the mean over valid tokens of logsumexp(logits)^2, not of probabilities."""
  log_partition = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
  return _mean_over_valid(jnp.square(log_partition), valid)


def squared_variation(values: Float[Array, "E"], *, ddof: int = 0) -> Float[Array, ""]:
  """Returns (standard deviation / mean)^2 over experts; 0 if all are equal.

  Args:
    ddof: 0 for the population variance (V-MoE), 1 for the unbiased one (Tutel).
  """
  mean = jnp.mean(values)
  variance = jnp.sum(jnp.square(values - mean)) / max(values.shape[0] - ddof, 1)
  return ratio(variance, jnp.maximum(jnp.square(mean), 1e-20))


def importance_loss(
  gates: Float[Array, "T E"], valid: Bool[Array, "T"], *, ddof: int = 0
) -> Float[Array, ""]:
  """Returns CV^2 of the experts' summed gates (Shazeer et al., equation 7).

  Args:
    gates: sparse gates (Shazeer et al.) or all probabilities (V-MoE).
  """
  return squared_variation(_mean_over_valid(gates, valid), ddof=ddof)


def load_probability(
  clean: Float[Array, "T E"],
  noisy: Float[Array, "T E"],
  scale: Float[Array, "T E"],
  num_selected: int,
  *,
  excluding: bool = True,
) -> Float[Array, "T E"]:
  """Returns the probability that new noise puts the expert among the token's K best.

  Phi((clean - threshold) / scale). The threshold of Shazeer et al. (equation 9) is
  the K-th largest of the OTHER experts' noisy logits, so that of K experts each is sure
  to be among the best; in V-MoE and Tutel (`excluding=False`) it is the K-th largest of
  all.
  """
  if excluding and num_selected >= noisy.shape[-1]:
    return jnp.ones_like(noisy)
  k = min(num_selected + 1, noisy.shape[-1])
  best = jax.lax.top_k(noisy, k)[0]
  inside = best[:, num_selected - 1 : num_selected]
  if excluding and k > num_selected:
    # An expert among the K best is excluded, so its threshold is the K+1-th largest.
    threshold = jnp.where(noisy >= inside, best[:, num_selected:], inside)
  else:
    threshold = jnp.broadcast_to(inside, noisy.shape)
  # Noise that can no longer change a choice: the square of its scale would underflow.
  return jax.scipy.stats.norm.cdf((clean - threshold) / jnp.maximum(scale, 1e-6))


def load_loss(
  probability: Float[Array, "T E"], valid: Bool[Array, "T"], *, ddof: int = 0
) -> Float[Array, ""]:
  """Returns CV^2 of the smooth load estimate (Shazeer et al., equation 11)."""
  return squared_variation(_mean_over_valid(probability, valid), ddof=ddof)


def device_loss(
  probs: Float[Array, "T E"],
  chosen: Float[Array, "E"],
  valid: Bool[Array, "T"],
  num_groups: int,
) -> Float[Array, ""]:
  """Returns the balance loss over groups (devices), 1 at balance (DeepSeek-V2, eq. 24).

  sum_i f_i P_i, f_i the mean of E * (share of assignments) over the group's experts,
  P_i the sum of its mean probabilities.
  """
  num_experts = probs.shape[-1]
  fraction = jax.lax.stop_gradient(chosen) / jnp.maximum(jnp.sum(chosen), 1.0)
  f = jnp.mean((num_experts * fraction).reshape(num_groups, -1), axis=-1)
  p = jnp.sum(_mean_over_valid(probs, valid).reshape(num_groups, -1), axis=-1)
  return jnp.sum(f * p)


def communication_loss(
  probs: Float[Array, "T E"],
  expert: Int[Array, "T K"],
  valid: Bool[Array, "T"],
  num_groups: int,
) -> Float[Array, ""]:
  """Returns the balance loss of tokens received per group (DeepSeek-V2, eq. 27).

  sum_i f_i P_i, f_i = D * (share of the sends that go to group i), D the number of
  groups; 1 at balance. A token is sent to a group once, however many of its experts
  are there. The paper divides by the allowed sends, M per token; dividing by the actual
  sends keeps 1 at balance.
  """
  size = probs.shape[-1] // num_groups
  index = jnp.arange(num_groups, dtype=jnp.int32)[None, None, :]
  sent = jnp.any((expert // size)[:, :, None] == index, axis=1) & valid[:, None]
  count = jnp.sum(sent.astype(jnp.float32), axis=0)
  f = num_groups * count / jnp.maximum(jnp.sum(count), 1.0)
  p = jnp.sum(_mean_over_valid(probs, valid).reshape(num_groups, -1), axis=-1)
  return jnp.sum(f * p)


def updated_bias(
  bias: Float[Array, "*l E"],
  chosen: Float[Array, "*l E"],
  rate: float,
  present: Bool[Array, "*l E"] | None = None,
) -> Float[Array, "*l E"]:
  """Returns the sigmoid_bias after one optimizer step, raised where load was low.

  b + rate * sign(mean load - load). Never in evaluation, never per microbatch.

  Args:
    bias: before the step.
    chosen: assignments requested, summed over the WHOLE batch: groups, devices and
      gradient accumulation.
    rate: step size.
    present: the experts that took part; the others keep their bias and are excluded
      from the mean. None means all.
  """
  if present is None:
    error = jnp.mean(chosen, axis=-1, keepdims=True) - chosen
  else:
    error = jnp.where(present, mean_load(chosen, present) - chosen, 0.0)
  return bias + rate * jnp.sign(error)


def mean_load(
  chosen: Float[Array, "*l E"], present: Bool[Array, "*l E"]
) -> Float[Array, "*l 1"]:
  """Returns the mean assignments per expert that took part."""
  count = jnp.sum(present.astype(jnp.float32), axis=-1, keepdims=True)
  return jnp.sum(chosen, axis=-1, keepdims=True) / jnp.maximum(count, 1.0)


def entropy_bonus(
  probs: Float[Array, "T E"], valid: Bool[Array, "T"]
) -> Float[Array, ""]:
  """Returns minus the mean entropy of a token's probabilities, in nats; minimised."""
  return -_mean_over_valid(entropy(probs), valid)
