"""Are experts trained apart as good as one model trained on everything?

  bash experiments/apart/run.sh

Branch-Train-MiX (arXiv:2403.07816): a dense seed model is copied, and each copy is
trained on one of four domains without any communication. Their feed-forward layers become
the experts of one model, whose router is random or made of domain means. This joined
model is trained briefly on all domains. It is compared, at the same total of training
FLOPs, with the seed model trained on all domains, dense or upcycled first, and with the
sparse model from scratch. The FLOPs of the seed model and of all branches are included.
The joined model is also trained for four times as long, with more FLOPs than all others.

Learning rates are tuned with seed 0, including those of the branches; a router of means
has the rate of a random one.
"""

from typing import Any

from experiments.apart import base as common
from moejax.config import Config
from moejax.sweep.spec import Spec

STARTS = "runs/apart/starts"


def sides() -> dict[str, dict[str, Any]]:
  dense = common.flops_per_step(common.DENSE)
  sparse = common.flops_per_step(common.SPARSE)
  branches = common.BRANCH_STEPS * len(common.DOMAINS)
  mixed = common.MIXED_STEPS * sparse / dense  # In dense steps, as all else here.

  def after(start: str, steps: float) -> dict[str, Any]:
    return {
      "train.init_from": f"{STARTS}/{start}={{seed}}",
      "train.num_steps": round(steps),
    }

  whole = common.SEED_STEPS + branches + mixed
  return {
    "joined": common.SPARSE | after("joined", common.MIXED_STEPS),
    "joined, router of means": common.SPARSE | after("means", common.MIXED_STEPS),
    "joined, longer": common.SPARSE | after("joined", common.LONGER * common.MIXED_STEPS),
    "seed on all, dense": common.DENSE | after("seed", branches + mixed),
    "seed on all, upcycled": common.SPARSE
    | after("upcycled", (branches + mixed) * dense / sparse),
    "scratch, sparse": common.SPARSE | {"train.num_steps": round(whole * dense / sparse)},
  }


def rates(name: str) -> tuple[float, ...]:
  if name == "joined, router of means":
    return (common.RATES["joined"],)
  return (2e-3, 4e-3, *common.TRIED) if name == "joined" else common.TRIED


def variants() -> dict[str, dict[str, Any]]:
  return {
    f"{name}, rate {rate:g}": {**settings, "optimizer.learning_rate": rate}
    for name, settings in sides().items()
    for rate in rates(name)
  }


def side_of(config: Config) -> str:
  start = config.train.init_from.rpartition("/")[2].partition("=")[0]
  if start == "joined":
    is_short = config.train.num_steps == common.MIXED_STEPS
    return start if is_short else f"{start}, longer"
  return {
    "": "scratch, sparse",
    "means": "joined, router of means",
    "seed": "seed on all, dense",
    "upcycled": "seed on all, upcycled",
  }[start]


def is_wanted(config: Config) -> bool:
  """One seed tunes, all measure."""
  best = common.RATES[side_of(config)]
  return config.train.seed == 0 or config.optimizer.learning_rate == best


def get_sweep() -> Spec:
  return Spec(
    base=common.base(),
    variants=variants(),
    seeds=tuple(range(common.SEEDS)),
    conditions=(is_wanted,),
  )
