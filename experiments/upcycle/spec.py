"""Is it better to upcycle a dense model or to train the sparse one from scratch?

  bash experiments/upcycle/run.sh

Sparse Upcycling (arXiv:2212.05055) starts the experts as copies of a trained dense layer.
Here every side gets the same training FLOPs, and the upcycled side includes those of its
dense model: within the FLOPs of 1,600 dense steps, a model upcycled from a dense one of
400 steps is trained with the rest. It is compared with the sparse model from scratch and
with the dense model, which both get all the FLOPs. Each run has its own warmup and cosine
decay over its own steps; so had the dense models that are upcycled.

Copies are cut into four parts with equal router rows (virtual groups, arXiv:2410.07524),
so the first loss is the dense model's. Upcycled models read the text in a different order
from their dense models (`base.FIRST_DENSE_SEED`).

Each side's learning rate is tuned with seed 0 at 800 steps.
"""

import functools
from typing import Any

from experiments.upcycle import base as common
from moejax.config import Config
from moejax.sweep.spec import Spec

STARTS = "runs/upcycle/starts"
TUNED = 800
"""The budget at which all rates are tried; upcycle's dense model has half of it."""


@functools.cache
def flops_per_step(sparse: bool) -> float:
  """Returns the training FLOPs of a step of the sparse model or the dense one."""
  settings = common.SPARSE if sparse else common.DENSE
  return common.flops_per_step(common.base(), settings)


def sparse_steps(total: int, age: int = 0) -> int:
  """Returns the sparse steps that a budget leaves beside a dense model.

  Args:
    total: the budget, in dense steps.
    age: steps of the dense model; 0 is from scratch.
  """
  return round((total - age) * flops_per_step(False) / flops_per_step(True))


def sides(total: int) -> dict[str, dict[str, Any]]:
  """Returns what can be done with a budget, by name."""
  found = {
    f"dense, {total}": {**common.DENSE, "train.num_steps": total},
    f"scratch, {total}": {**common.SPARSE, "train.num_steps": sparse_steps(total)},
  }
  for age in common.AGES:
    if age < total:
      found[f"upcycle {age}, {total}"] = {
        **common.SPARSE,
        "train.num_steps": sparse_steps(total, age),
        "train.init_from": f"{STARTS}/age={age},seed={{seed}}",
      }
  return found


def best_name(side: str) -> str:
  """Returns the variant of a side, such as `scratch, 800`, at its best rate."""
  return f"{side}, rate {common.RATES[side.partition(',')[0].partition(' ')[0]]:g}"


def side_of(config: Config) -> str:
  if config.moe.dense_twin:
    return "dense"
  return "upcycle" if config.train.init_from else "scratch"


def start_age(config: Config) -> int:
  """Returns the steps of the dense model that a run starts from; 0 if from none."""
  _, _, age = config.train.init_from.partition("age=")
  return int(age.partition(",")[0]) if age else 0


def variants() -> dict[str, dict[str, Any]]:
  return {
    f"{name}, rate {rate:g}": {**settings, "optimizer.learning_rate": rate}
    for total in common.TOTALS
    for name, settings in sides(total).items()
    for rate in common.TRIED
    if best_name(name).endswith(f"rate {rate:g}")
    or name in (f"dense, {TUNED}", f"scratch, {TUNED}", f"upcycle {TUNED // 2}, {TUNED}")
  }


def is_wanted(config: Config) -> bool:
  """One seed tunes, all measure."""
  best = config.optimizer.learning_rate == common.RATES[side_of(config)]
  return config.train.seed == 0 or best


def get_sweep() -> Spec:
  return Spec(
    base=common.base(),
    variants=variants(),
    seeds=tuple(range(common.SEEDS)),
    conditions=(is_wanted,),
  )
