"""Identifies configs that compile the same programs, or whose steps cost the same."""

import fnmatch
import hashlib
import json
from collections.abc import Sequence

from moejax.config import Config
from moejax.config import text as config_text

_OUTSIDE_THE_STEP = (
  "schema_version",
  "data.cache_dir",
  "data.num_workers",
  "data.prefetch",
  "data.max_documents",
  "data.*_fraction",
  "train.seed",
  "train.init_from",
  "train.log_every",
  "train.eval_every",
  "train.eval_batches",
  "train.final_eval_tokens",
  "train.sample",
  "train.report",
  "train.trace_steps",
  "train.checkpoint_every",
  "train.keep_last",
  "train.keep_best",
  "train.max_bad_steps",
  "train.tensorboard",
)
"""Fields that are not part of the compiled train step."""

_CONSTANTS = (
  "data.name",
  "data.path",
  "data.text_field",
  "data.domains",
  "train.num_steps",
  "model.init_scale",
  "model.max_position",
  "moe.router_init_scale",
  "moe.eval_capacity_factor",
  "moe.*_weight",
  "optimizer.learning_rate",
  "optimizer.schedule",
  "optimizer.warmup_steps",
  "optimizer.*_fraction",
  "optimizer.beta*",
  "optimizer.epsilon",
  "optimizer.weight_decay",
)
"""Fields that are constants in it, and change neither its shapes nor its cost."""


def program_digest(config: Config) -> str:
  """Returns a name that is equal for runs whose compiled programs are the same."""
  return _digest(config, _OUTSIDE_THE_STEP)


def shape_digest(config: Config) -> str:
  """Returns a name that is equal for runs whose steps cost the same.

  Runs that differ in loss weights, learning rates or lengths share it. A loss with zero
  weight is still computed.
  """
  return _digest(config, (*_OUTSIDE_THE_STEP, *_CONSTANTS))


def _digest(config: Config, ignored: Sequence[str]) -> str:
  leaves = {
    name: value
    for name, value in config_text.leaves(config).items()
    if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
  }
  text = json.dumps(leaves, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]
