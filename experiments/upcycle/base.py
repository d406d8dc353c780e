"""What all runs of this study share: model, text, schedule and budgets."""

from typing import Any

from configs import default
from moejax.config import Config
from moejax.config import text as config_text
from moejax.cost import flops

TOTALS = (400, 800, 1600)
"""Budgets, in FLOPs of so many steps of the dense model."""
AGES = (200, 400, 800)
"""Steps of the dense models that are upcycled, each with its whole schedule."""
FIRST_DENSE_SEED = 10
"""Dense models have seeds of their own: one that is upcycled read other text before."""
SEEDS = 3
TRIED = (8e-3, 1.6e-2, 3.2e-2)
"""Learning rates."""
RATES = {"dense": 1.6e-2, "scratch": 1.6e-2, "upcycle": 1.6e-2}
"""The best of each side."""

VOCABULARY = 1024

DENSE: dict[str, Any] = {"moe.dense_twin": True}
SPARSE: dict[str, Any] = {
  "moe.router": "sigmoid_bias",
  "moe.num_experts": 16,
  "moe.segments": 4,
  "moe.renormalize": "before_drop",
  "moe.balance_weight": 0.0,
  "moe.sigmoid_bias.bias_update_rate": 0.01,
}
"""Sixteen experts cut into 64, of which a token visits four (arXiv:2408.15664)."""


def base() -> Config:
  config = default.get_config()
  config.data.name = "python_packages"
  config.model.num_layers, config.model.width, config.model.num_heads = 2, 32, 1
  config.model.hidden = config.moe.hidden = 128
  config.moe.every, config.moe.offset = 1, 0
  config.moe.capacity_factor = None
  config.optimizer.name, config.optimizer.warmup_steps = "adamw", 50
  config.train.batch_size = 8
  config.train.eval_batches = 4
  config.train.eval_every = config.train.checkpoint_every = max(TOTALS)
  config.train.final_eval_tokens = 65_536
  config.train.sample = config.train.report = config.train.tensorboard = False
  return config


def flops_per_step(config: Config, settings: dict[str, Any]) -> float:
  """Returns the training FLOPs of a step under some settings, which `config` gets."""
  for name, value in settings.items():
    config_text.set_field(config, name, value)
  return flops.flops_per_token(config, VOCABULARY)["total"] * flops.tokens_per_step(
    config
  )
