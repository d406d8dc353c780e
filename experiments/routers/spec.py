"""Which router learns best at equal FLOPs? All causal routers.

  python -m experiments.sweep --spec=experiments/routers/spec.py \
    --workdir=runs/routers --jobs=2

Step times: afterwards, the same with --jobs=1 --time_steps=20, so a step has all cores.

All variants have the same active FLOPs outside the router and, except for the dense twin,
the same number of expert parameters, since K > 1 cuts each expert into K parts
(`moe.segments`). Every causal router is included except `dense`, which cannot have the
same FLOPs. Three seeds of 200 steps of 8 sequences.

To study a router of your own, register it and add a line to `VARIANTS`.
"""

from typing import Any

from experiments.expert_count.spec import base
from moejax.sweep.spec import Spec

TWO = {"moe.segments": 2}
"""Sixteen experts of half the width, two chosen: the parameters and FLOPs of top-1."""

VARIANTS: dict[str, dict[str, Any]] = {
  "dense twin": {"moe.dense_twin": True},
  "switch": {"moe.router": "switch"},
  "switch, next best": {"moe.router": "switch", "moe.overflow": "next_best"},
  "switch, dropless": {"moe.router": "switch", "moe.capacity_factor": None},
  "hash": {"moe.router": "hash"},
  "hash, balanced": {"moe.router": "hash", "moe.hash.spread": "balanced"},
  "random": {"moe.router": "random"},
  "forced balance": {"moe.router": "forced_balance"},
  "top2": {
    **TWO,
    "moe.router": "top2",
    "moe.top2.second_policy": "random",
    "moe.renormalize": "before_drop",
  },
  "top_k": {**TWO, "moe.router": "top_k"},
  "top_k, renormalised": {**TWO, "moe.router": "top_k", "moe.renormalize": "before_drop"},
  "noisy_top_k": {**TWO, "moe.router": "noisy_top_k", "moe.renormalize": "before_drop"},
  "group_limited": {
    **TWO,
    "moe.router": "group_limited",
    "moe.group_limited.num_expert_groups": 4,
    "moe.group_limited.num_selected_groups": 2,
  },
  "sigmoid_bias": {
    **TWO,
    "moe.router": "sigmoid_bias",
    "moe.renormalize": "before_drop",
    "moe.balance_weight": 0,
    "moe.sigmoid_bias.bias_update_rate": 0.01,
  },
  "sigmoid_bias, slow": {
    **TWO,
    "moe.router": "sigmoid_bias",
    "moe.renormalize": "before_drop",
    "moe.balance_weight": 0,
    "moe.sigmoid_bias.bias_update_rate": 0.001,
  },
  "quantile_bias": {
    **TWO,
    "moe.router": "quantile_bias",
    "moe.renormalize": "before_drop",
    "moe.balance_weight": 0,
  },
  "quantile_balancing": {
    **TWO,
    "moe.router": "quantile_balancing",
    "moe.renormalize": "before_drop",
    "moe.balance_weight": 0,
  },
}


def get_sweep() -> Spec:
  return Spec(base=base(), variants=VARIANTS, seeds=(0, 1, 2))
