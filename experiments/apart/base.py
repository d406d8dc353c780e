"""What all runs of this study share: model, text, schedule and budget."""

from typing import Any

from experiments.upcycle import base as upcycle
from moejax.config import Config

DOMAINS = ("fonttools", "matplotlib", "pygments", "tensorflow-datasets")
"""Of 1.8M to 2.4M training tokens each."""
SEED_STEPS = 400
"""Of the seed model, on all domains."""
BRANCH_STEPS = 200
"""Of each branch, on its own."""
MIXED_STEPS = 100
"""Of the joined model, on all domains again."""
LONGER = 4
"""How many times as long it is trained once more, beyond the others' FLOPs."""
FIRST_SEED = 10
"""Seed models have seeds of their own: what starts from one reads other text."""
SEEDS = 3
TRIED = (8e-3, 1.6e-2)
"""Learning rates; of the joined model also lower ones."""
RATES = {
  "branch": 1.6e-2,
  "joined": 8e-3,
  "joined, router of means": 8e-3,
  "joined, longer": 1.6e-2,
  "seed on all, dense": 1.6e-2,
  "seed on all, upcycled": 1.6e-2,
  "scratch, sparse": 1.6e-2,
}
"""The best of them; seed models have that of dense models in experiments/upcycle."""

DENSE: dict[str, Any] = {"moe.dense_twin": True}
SPARSE: dict[str, Any] = {
  "moe.router": "top_k",
  "moe.num_experts": len(DOMAINS),
  "moe.num_selected": 2,
  "moe.renormalize": "before_drop",
}
"""As in the paper: one expert of full width for each domain; a token visits two."""


def base() -> Config:
  config = upcycle.base()
  config.data.domains = ",".join(DOMAINS)
  config.optimizer.learning_rate = 1.6e-2
  config.train.eval_every = config.train.checkpoint_every = 10_000
  config.train.final_eval_tokens = 262_144
  return config


def flops_per_step(settings: dict[str, Any]) -> float:
  """Returns the training FLOPs of a step of the dense model or the sparse one."""
  return upcycle.flops_per_step(base(), settings)
