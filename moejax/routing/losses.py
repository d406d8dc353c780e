"""Router losses: pressure towards balance, and against large logits.

Each is a value of ONE group; the layer weighs groups by their valid tokens.

Letters: T tokens of one group, E experts, K choices per token.
Sources: Switch, arXiv:2101.03961, equations 4 to 6; GShard, arXiv:2006.16668,
section 2.2; ST-MoE, arXiv:2202.08906, equation 5 (z-loss). How each codebase
scales them is in docs/conventions.md.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def _mean_over_valid(
  values: Float[Array, "T *rest"], valid: Bool[Array, "T"]
) -> Float[Array, "*rest"]:
  weight = valid.astype(jnp.float32)
  total = jnp.maximum(jnp.sum(weight), 1.0)
  return jnp.tensordot(weight, values, axes=1) / total


def balance_loss(
  probs: Float[Array, "T E"], chosen: Float[Array, "E"], valid: Bool[Array, "T"]
) -> Float[Array, ""]:
  """E * sum_e f_e P_e: 1 at perfect balance whatever K, E with one expert for all.

  f_e is the expert's share of the assignments asked for (before capacity, or an
  overloaded expert would look balanced); P_e the mean probability over valid
  tokens. Only P has a gradient. A group of padding alone gives 0.
  """
  num_experts = probs.shape[-1]
  fraction = jax.lax.stop_gradient(chosen) / jnp.maximum(jnp.sum(chosen), 1.0)
  return num_experts * jnp.sum(fraction * _mean_over_valid(probs, valid))


def z_loss(logits: Float[Array, "T E"], valid: Bool[Array, "T"]) -> Float[Array, ""]:
  """Mean over valid tokens of logsumexp(logits)^2: of logits, not of probabilities."""
  log_partition = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
  return _mean_over_valid(jnp.square(log_partition), valid)
