"""The branches of the study: each seed model trained on each domain, apart.

  python -m experiments.sweep --spec=experiments/apart/branches.py \
    --workdir=runs/apart/branches
"""

from experiments.apart import base as common
from moejax.sweep.points import axes
from moejax.sweep.spec import Spec


def get_sweep() -> Spec:
  config = common.base()
  config.moe.dense_twin = True
  config.optimizer.learning_rate = common.AFTER
  config.train.num_steps = common.BRANCH_STEPS
  config.train.init_from = "runs/apart/starts/seed={seed}"
  return Spec(
    base=config,
    axes=(axes.product("data.domains", *common.DOMAINS),),
    seeds=tuple(range(common.SEEDS)),
  )
