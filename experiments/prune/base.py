"""What all runs of this study share: model, text and schedule."""

from experiments.upcycle import base as upcycle
from moejax.config import Config

EXPERTS = 8
LEFT = (6, 4)
"""Experts after pruning 25% and 50%."""
CRITERIA = ("load", "reap", "norm", "mean_norm", "weights", "loss", "subset", "random")
STEPS = 800
MORE = STEPS // 10
"""Steps after pruning."""
FIRST_SEED = 10
"""Models that are pruned have their own seeds: the training after it reads other text."""
SEEDS = 3
RATE = 1.6e-2
"""Of the models that are pruned; the best of upcycle's sparse models from scratch."""
TRIED = (1e-3, 2e-3, 4e-3, 8e-3)
"""Rates for the training after pruning."""
BEST = {8: 2e-3, 6: 4e-3, 4: 8e-3}
"""Those used, by experts. With seed 0, 8 and 6 are within .0025 nats of the best of them;
4 is the end of the grid, where the loss still falls."""


def base() -> Config:
  config = upcycle.base()
  moe = config.moe
  moe.use_router("top_k")
  moe.num_experts, moe.num_selected = EXPERTS, 2
  moe.renormalize = "before_drop"
  config.optimizer.learning_rate = RATE
  config.train.num_steps = STEPS
  config.train.eval_every = config.train.checkpoint_every = STEPS
  return config
