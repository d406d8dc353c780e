"""The numbers that alarms check, per MoE layer, from the sums that a step returns.

Pure, on the host. A number is NaN where it means nothing, and NaN raises no alarm.

Letters: L MoE layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from moejax.routing.base import RouterStats
from moejax.routing.router import Router

Numbers = dict[str, Float[np.ndarray, "L"]]


def router_numbers(stats: RouterStats, health: Any, routers: Sequence[Router]) -> Numbers:
  """Returns a log line's numbers on each router's health, besides load and entropy.

  Args:
    stats: of a training step, summed over its batch.
    health: its `models.router_health.RouterHealth`.
    routers: of each MoE layer.

  Returns:
    Arrays [L]:

    top_gate         mean over valid tokens of the largest score: 1 is saturated
    top_logit        mean over valid tokens of the largest absolute logit
    router_gradient  gradient of the router over that of the other parameters, each as a
                     root mean square; NaN for a router that does not learn
    bias_span        largest minus smallest selection bias; only if a router has one
  """
  assert stats.top_gate is not None and stats.top_logit is not None
  learned = np.asarray([router.learned for router in routers])
  # The logits of soft routing are per slot.
  scored = learned & ~np.asarray([router.mixes for router in routers])
  valid = np.asarray(stats.num_valid, np.float64)
  gradient = np.asarray(health.gradient, np.float64)
  other = np.broadcast_to(np.asarray(health.other_gradient, np.float64), gradient.shape)
  out: Numbers = {
    "top_gate": _ratio(np.asarray(stats.top_gate, np.float64), valid, scored),
    "top_logit": _ratio(np.asarray(stats.top_logit, np.float64), valid, scored),
    "router_gradient": _ratio(gradient, other, learned),
  }
  span = np.asarray(health.bias_span, np.float64)
  return out | ({"bias_span": span} if np.any(span > 0) else {})


def alarm_numbers(
  stats: RouterStats,
  numbers: Numbers,
  *,
  routers: Sequence[Router],
  aux: Mapping[str, float],
  loss: float,
  unavoidable: Float[np.ndarray, "L"],
) -> Numbers:
  """Returns the number that each alarm compares with its threshold, by the alarm's name.

  Args:
    stats: of a training step, summed over its batch.
    numbers: from `router_numbers`.
    routers: of each MoE layer.
    aux: aux terms as they enter the loss: weighted, per token.
    loss: cross-entropy, nats per token.
    unavoidable: fraction of the assignments without a slot even at perfect balance; less
      than 1.

  Returns:
    Arrays [L], for `max_aux_share` [1]; `max_dead_steps` is left to `Deaths`.
  """
  learned = np.asarray([router.learned for router in routers])
  valid = np.asarray(stats.num_valid, np.float64)
  chosen = np.asarray(stats.chosen, np.float64)
  total = chosen.sum(axis=-1)
  experts = present_experts(stats).sum(axis=-1).astype(np.float64)
  several = learned & (experts > 1)
  share = _ratio(chosen.max(axis=-1), valid, several)
  even = _ratio(total, valid * np.maximum(experts, 1), several)
  dropped = total - np.asarray(stats.load, np.float64).sum(axis=-1)
  unknown = np.full(total.shape, math.nan)
  largest = max((abs(value) for value in aux.values()), default=0.0)
  return {
    "max_load": _ratio(share - even, 1.0 - even, several & (even < 1)),
    "min_load_entropy": _ratio(_entropy(chosen), np.log(np.maximum(experts, 2)), several),
    "max_logit": numbers["top_logit"],
    "max_gate": np.where(several, numbers["top_gate"], math.nan),
    "max_bias_span": numbers.get("bias_span", unknown),
    # Relative to what slots could hold, so that one expert with all assignments is near 1
    # at any capacity.
    "max_drops": (_ratio(dropped, total) - unavoidable) / (1.0 - unavoidable),
    "max_aux_share": _ratio(np.asarray([largest]), np.asarray([loss])),
    "min_gradient": numbers["router_gradient"],
    "max_gradient": numbers["router_gradient"],
  }


def present_experts(stats: RouterStats) -> Bool[np.ndarray, "L E"]:
  """Returns the experts that took part in the step: all, unless some were dropped out."""
  if stats.present is None:
    return np.ones(np.shape(stats.chosen), bool)
  return np.asarray(stats.present) > 0


def _entropy(chosen: Float[np.ndarray, "L E"]) -> Float[np.ndarray, "L"]:
  """Returns the entropy of each layer's load over its experts, in nats."""
  share = chosen / np.maximum(chosen.sum(axis=-1, keepdims=True), 1e-30)
  # Avoids minus zero if one expert has all tokens.
  return np.sum(share * -np.log(np.where(share > 0, share, 1.0)), axis=-1) + 0.0


def _ratio(
  above: np.ndarray, below: np.ndarray, counts: Any = True
) -> Float[np.ndarray, "L"]:
  """Returns above / below, NaN where `counts` is False or `below` is zero."""
  where = np.broadcast_to(counts, above.shape) & (below > 0)
  return np.divide(above, below, out=np.full(above.shape, math.nan), where=where)


class Deaths:
  """Counts for how many steps each expert has been chosen by no token."""

  def __init__(self):
    self._since: Float[np.ndarray, "L E"] | None = None

  def __call__(self, step: int, stats: RouterStats) -> Float[np.ndarray, "L"]:
    """Returns the most steps that an expert of each layer has been dead.

    Counts from the first logged step without a token. An expert left out of a step
    (expert dropout) neither dies nor comes back in it.
    """
    chosen = np.asarray(stats.chosen) > 0
    if self._since is None:
      self._since = np.full(chosen.shape, math.nan)
    self._since[chosen] = math.nan
    new = ~chosen & present_experts(stats) & np.isnan(self._since)
    # A batch without tokens does not count.
    new &= np.asarray(stats.num_valid)[:, None] > 0
    self._since[new] = step
    return np.max(step - np.where(np.isnan(self._since), step, self._since), axis=-1)
