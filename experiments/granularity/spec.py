"""Few large experts, or many small ones?

  python -m experiments.sweep --spec=experiments/granularity/spec.py \
    --workdir=runs/granularity --jobs=2

Step times: afterwards, the same with --jobs=1 --time_steps=20, so a step has all cores.

Each of 8 experts is split into m of an m-th of its width, and a token visits m of the 8m
(DeepSeekMoE, arXiv:2401.06066, section 3.1): parameters and FLOPs outside the router stay
the same. Three seeds of 200 steps of 8 sequences.
"""

from experiments.expert_count.spec import base
from moejax.sweep.points import axes
from moejax.sweep.spec import Spec


def get_sweep() -> Spec:
  config = base()
  # Top-1 keeps its probability as gate, K gates sum to 1 only if they are scaled: without
  # this, m = 1 alone would learn through another gate.
  config.moe.use_router("top_k")
  return Spec(
    base=config,
    axes=(axes.product("moe.segments", 1, 2, 4, 8),),
    seeds=(0, 1, 2),
  )
