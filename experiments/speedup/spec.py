"""How much sooner does a sparse model reach its dense twin's final loss?

  python -m experiments.sweep --spec=experiments/speedup/spec.py \
    --workdir=runs/speedup --jobs=2

Step times: afterwards, the same with --jobs=1 --time_steps=20, so a step has all cores.

Switch Transformers (arXiv:2101.03961, section 3.1, figure 5) reports up to 7x in steps.
Here the active part is small, and the text is long for its size: width 32, four layers,
8.2M tokens for the dense twin. Every layer is an MoE layer without capacity; all settings
have the same active FLOPs outside the router and see the same text in the same order. A
sparse setting is trained for half or a third of the twin's steps, with its own learning
rate decay over them: it does not stop early.

Each side is tuned with seed 0, and its best learning rate runs with three seeds, except
for 1024 experts, which have one. (The two settings with the most experts, which take
longest, try two rates instead of three, and the learned router is best at the highest
one: both can only count against the sparse side.)
"""

from typing import Any

from configs import default
from moejax.config import Config
from moejax.sweep.spec import Spec

RATES = (8e-3, 1.6e-2, 4e-3)
DENSE_STEPS = 4000

HASH = {"moe.router": "hash", "moe.hash.spread": "balanced"}
"""Experts by token id (arXiv:2106.04426, "balanced assignment"): nothing to learn."""
LEARNED = {
  "moe.router": "sigmoid_bias",
  "moe.segments": 4,
  "moe.renormalize": "before_drop",
  "moe.balance_weight": 0.0,
  "moe.sigmoid_bias.bias_update_rate": 0.01,
}
"""Sixteen experts cut into 64, of which a token visits four (arXiv:2408.15664)."""

HALF, THIRD = DENSE_STEPS // 2, 1300

SIDES: dict[str, dict[str, Any]] = {
  "dense twin": {"moe.dense_twin": True, "train.num_steps": DENSE_STEPS},
  "4 of 64 learned": {**LEARNED, "moe.num_experts": 16, "train.num_steps": HALF},
  "hash to 64": {**HASH, "moe.num_experts": 64, "train.num_steps": HALF},
  "hash to 256": {**HASH, "moe.num_experts": 256, "train.num_steps": THIRD},
  "hash to 1024": {**HASH, "moe.num_experts": 1024, "train.num_steps": THIRD},
}
LONGEST = ("hash to 256", "hash to 1024")
"""Not tuned at the highest rate."""


def best_rate(config: Config) -> float:
  """Returns the rate with the lowest loss of seed 0."""
  learned = config.moe.router == "sigmoid_bias" and not config.moe.dense_twin
  return 1.6e-2 if learned else 8e-3


def base() -> Config:
  config = default.get_config()
  config.data.name = "python_packages"
  config.model.width, config.model.num_heads, config.model.hidden = 32, 1, 128
  config.moe.every, config.moe.offset = 1, 0
  config.moe.hidden = 128
  config.moe.capacity_factor = None
  config.optimizer.name, config.optimizer.warmup_steps = "adamw", 200
  config.train.eval_every, config.train.eval_batches = 100, 16
  config.train.checkpoint_every = DENSE_STEPS
  config.train.final_eval_tokens = 131_072
  config.train.sample = config.train.report = config.train.tensorboard = False
  return config


def variants() -> dict[str, dict[str, Any]]:
  """Every side with its learning rates."""
  return {
    f"{side}, rate {rate:g}": {**settings, "optimizer.learning_rate": rate}
    for rate in RATES
    for side, settings in SIDES.items()
    if rate < max(RATES) or side not in LONGEST
  }


def is_wanted(config: Config) -> bool:
  """One seed tunes, three measure."""
  is_best = config.optimizer.learning_rate == best_rate(config)
  return config.train.seed == 0 or (is_best and config.moe.num_experts < 1024)


def get_sweep() -> Spec:
  return Spec(base=base(), variants=variants(), seeds=(0, 1, 2), conditions=(is_wanted,))
