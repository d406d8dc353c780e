"""The models that the study prunes, one for each seed.

python -m experiments.sweep --spec=experiments/prune/whole.py --workdir=runs/prune/whole
"""

from experiments.prune import base as common
from moejax.sweep.spec import Spec


def get_sweep() -> Spec:
  first = common.FIRST_SEED
  return Spec(base=common.base(), seeds=tuple(range(first, first + common.SEEDS)))
