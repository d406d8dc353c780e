"""Turns the sums that a step returns into the logged numbers. Pure, on the host.

Ratios are computed here, once, from sums over groups, devices and microbatches; a
mean of ratios would weight a nearly empty group like a full one.

Letters: L MoE layers, E experts.
"""

import math
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Float

from moejax.cost import chips
from moejax.models.loss import Sums
from moejax.routing.base import RouterStats

MAX_LOAD_NUMBERS = 1024
"""With more (layer, expert) pairs, a log line holds quantiles, not every load."""

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def layer_metrics(stats: RouterStats) -> dict[str, Float[np.ndarray, "..."]]:
  """Returns what the router did in each MoE layer.

  Args:
    stats: sums, with a leading axis L.

  Returns:
    Arrays [L], and `load` [L, E]; zeros, and E dead experts, without valid tokens.

    load             each expert's share of the computed assignments; sums to 1
    drop_fraction    fraction of the requested assignments that was not computed
    dropped_tokens   fraction of the valid tokens without a computed assignment
    entropy          of the router's distribution, mean over valid tokens, nats
    entropy_fraction entropy / log E: 1 is uniform
    max_load_ratio   largest load over mean load: 1 is balanced, E is collapsed
    dead_experts     number of experts that computed nothing
  """
  load = np.asarray(stats.load, np.float64)
  chosen = np.asarray(stats.chosen, np.float64).sum(axis=-1)
  valid = np.asarray(stats.num_valid, np.float64)
  kept = load.sum(axis=-1)
  num_experts = load.shape[-1]
  entropy = _ratio(np.asarray(stats.entropy, np.float64), valid)
  return {
    "load": _ratio(load, np.broadcast_to(kept[:, None], load.shape)),
    "drop_fraction": _ratio(chosen - kept, chosen),
    "dropped_tokens": _ratio(np.asarray(stats.dropped_tokens, np.float64), valid),
    "entropy": entropy,
    "entropy_fraction": entropy / max(math.log(num_experts), 1e-30)
    if num_experts > 1
    else np.zeros_like(entropy),
    "max_load_ratio": _ratio(load.max(axis=-1) * num_experts, kept),
    "dead_experts": (load == 0).sum(axis=-1).astype(np.float64),
  }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
  return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def dropped_fraction(stats: RouterStats) -> float:
  """Returns the fraction of requested assignments, of all layers, not computed."""
  chosen = float(np.sum(np.asarray(stats.chosen, np.float64)))
  kept = float(np.sum(np.asarray(stats.load, np.float64)))
  return (chosen - kept) / chosen if chosen else 0.0


def lost_fraction(stats: RouterStats) -> float:
  """Returns the part of `dropped_fraction` for which a bounded exchange had no room."""
  chosen = float(np.sum(np.asarray(stats.chosen, np.float64)))
  return float(np.sum(np.asarray(stats.lost, np.float64))) / chosen if chosen else 0.0


def has_experts(stats: RouterStats | None) -> TypeGuard[RouterStats]:
  """Returns whether there is any MoE layer to report on."""
  return stats is not None and np.size(stats.load) > 0


def loss_metrics(sums: Sums) -> dict[str, float]:
  """Returns cross-entropy, bits per byte, aux terms and drop fractions, from sums.

  Args:
    sums: on the host.
  """
  tokens = max(float(sums.tokens), 1.0)
  out = {"loss": float(sums.loss) / tokens}
  if sums.bytes > 0:
    out["bits_per_byte"] = float(sums.loss) / math.log(2) / float(sums.bytes)
  for name, value in sums.aux.items():
    out[name] = float(value) / tokens
  if has_experts(sums.stats):
    out["dropped_fraction"] = dropped_fraction(sums.stats)
    if sums.stats.lost is not None:
      out["exchange_lost_fraction"] = lost_fraction(sums.stats)
  return out


def speed_metrics(
  tokens: float,
  seconds: float,
  *,
  flops_per_token: float | None,
  num_devices: int,
  device_kind: str,
) -> dict[str, float]:
  """Returns tokens/s, FLOP/s if FLOPs are known, and utilisation if the peak is too.

  Args:
    tokens: valid tokens processed.
    seconds: wall-clock time they took.
    flops_per_token: model FLOPs of training one token (forward and backward).
    num_devices: devices that shared the work.
    device_kind: as JAX reports it.
  """
  if seconds <= 0:
    return {}
  rate = tokens / seconds
  out = {"tokens_per_second": rate}
  if flops_per_token:
    out["model_flops_per_second"] = rate * flops_per_token
    chip = chips.per_device(device_kind)
    # Relative to the bfloat16 peak whatever the compute type, so that a float32 run
    # shows what it leaves unused.
    if chip is not None and chip.flops is not None:
      out["utilisation"] = rate * flops_per_token / (chip.flops * num_devices)
  return out


def layers_for_log(layers: dict[str, np.ndarray]) -> dict[str, Any]:
  """Returns per-layer numbers as short JSON: every load, or quantiles if many."""
  out: dict[str, Any] = {
    name: _short(value) for name, value in layers.items() if name != "load"
  }
  load = layers["load"]
  if load.size <= MAX_LOAD_NUMBERS:
    out["load"] = _short(load)
  else:
    out["load_quantiles"] = _short(np.quantile(load, QUANTILES, axis=-1).T)
  return out


def _short(values: np.ndarray) -> list[Any]:
  """Returns nested lists with five significant digits: enough to read in a log."""
  if values.ndim > 1:
    return [_short(v) for v in values]
  return [float(f"{v:.5g}") for v in values]
