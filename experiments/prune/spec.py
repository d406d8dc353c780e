"""Which experts can be pruned, and how much does a little training recover?

  bash experiments/prune/run.sh

From a model with eight experts, of which a token visits two, a quarter or half are pruned
by each criterion of `tools.surgery prune`; `random` is the control. Each pruned model,
and the whole model, is then trained for 10% of the whole model's steps, with its own
warmup and decay. They are compared with a model that has half of the experts from the
start and is trained for all the steps.

Learning rates after pruning are tried with seed 0 on the whole model and on what `reap`
leaves of it, for each number of experts; README.md says how close to the best they are.
The model with half of the experts from the start has the rate of the whole model.
"""

from typing import Any

from experiments.prune import base as common
from moejax.config import Config
from moejax.sweep.spec import Spec

STARTS = "runs/prune/starts"
TUNED = ("whole", "reap, 6", "reap, 4")


def sides() -> dict[str, dict[str, Any]]:
  after = {"train.num_steps": common.MORE, "optimizer.warmup_steps": common.MORE // 10}
  found: dict[str, dict[str, Any]] = {
    "whole": after | {"train.init_from": f"{STARTS}/whole,seed={{seed}}"}
  }
  for left in common.LEFT:
    for by in common.CRITERIA:
      start = f"{STARTS}/by={by},experts={left},seed={{seed}}"
      settings = {"moe.num_experts": left, "train.init_from": start}
      found[f"{by}, {left}"] = after | settings
  found[f"from the start, {min(common.LEFT)}"] = {
    "moe.num_experts": min(common.LEFT),
    "train.num_steps": common.STEPS + common.MORE,
  }
  return found


def best_rate(experts: int, is_pruned: bool = True) -> float:
  """Returns the rate of all seeds; `is_pruned` is False for the model from the start."""
  return common.BEST[experts] if is_pruned else common.RATE


def variants() -> dict[str, dict[str, Any]]:
  found = {}
  for name, settings in sides().items():
    experts = settings.get("moe.num_experts", common.EXPERTS)
    best = best_rate(experts, "train.init_from" in settings)
    for rate in common.TRIED if name in TUNED else [best]:
      found[f"{name}, rate {rate:g}"] = settings | {"optimizer.learning_rate": rate}
  return found


def is_wanted(config: Config) -> bool:
  """One seed tunes, all measure."""
  best = best_rate(config.moe.num_experts, bool(config.train.init_from))
  return config.train.seed == 0 or config.optimizer.learning_rate == best


def get_sweep() -> Spec:
  return Spec(
    base=common.base(),
    variants=variants(),
    seeds=tuple(range(common.SEEDS)),
    conditions=(is_wanted,),
  )
