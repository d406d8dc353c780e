"""The dense models that the study upcycles, one for each age and seed.

  python -m experiments.sweep --spec=experiments/upcycle/dense.py \
    --workdir=runs/upcycle/dense
"""

from experiments.upcycle import base as common
from moejax.sweep.points import axes
from moejax.sweep.spec import Spec


def get_sweep() -> Spec:
  config = common.base()
  config.moe.dense_twin = True
  config.optimizer.learning_rate = common.RATES["dense"]
  # Nothing is asked of them but their parameters.
  config.train.final_eval_tokens = 1024
  first = common.FIRST_DENSE_SEED
  return Spec(
    base=config,
    axes=(axes.product("train.num_steps", *common.AGES),),
    seeds=tuple(range(first, first + common.SEEDS)),
  )
