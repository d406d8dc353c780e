"""The branches of the study: each seed model trained on each domain, apart.

  python -m experiments.sweep --spec=experiments/apart/branches.py \
    --workdir=runs/apart/branches
"""

from experiments.apart import base as common
from moejax.config import Config
from moejax.sweep.points import axes
from moejax.sweep.spec import Spec


def is_wanted(config: Config) -> bool:
  """One seed tunes, all train."""
  best = config.optimizer.learning_rate == common.RATES["branch"]
  return config.train.seed == 0 or best


def get_sweep() -> Spec:
  config = common.base()
  config.moe.dense_twin = True
  config.train.num_steps = common.BRANCH_STEPS
  config.train.init_from = "runs/apart/starts/seed={seed}"
  return Spec(
    base=config,
    axes=(
      axes.product("optimizer.learning_rate", *common.TRIED),
      axes.product("data.domains", *common.DOMAINS),
    ),
    seeds=tuple(range(common.SEEDS)),
    conditions=(is_wanted,),
  )
