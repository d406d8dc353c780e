"""The seed models of the study: dense, on all domains.

  python -m experiments.sweep --spec=experiments/apart/seeds.py \
    --workdir=runs/apart/seeds
"""

from experiments.apart import base as common
from moejax.sweep.spec import Spec


def get_sweep() -> Spec:
  config = common.base()
  config.moe.dense_twin = True
  config.train.num_steps = common.SEED_STEPS
  first = common.FIRST_SEED
  return Spec(base=config, seeds=tuple(range(first, first + common.SEEDS)))
