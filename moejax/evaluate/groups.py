"""Routing groups in evaluation: the same as in training.

With a finite capacity, whether a token is dropped depends on its group, so all
evaluations (during training, after the last step, `experiments.evaluate`) use the same
groups. A group is

  moe.group_size = 0   a sequence
  moe.group_size = n   n consecutive tokens of the split, in stored order
  moe.group_size = -1  as many consecutive tokens as in a training microbatch

and each device's batch (under gspmd, the global batch) holds whole groups, so a result
depends neither on batch size nor on mesh. Only a split's last group may contain padding,
which takes no slot.

Letters: B sequences of a microbatch, S tokens of a sequence, T tokens of a group.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from moejax.config import Config
from moejax.config.spans import target_length
from moejax.layers.moe import WHOLE_BATCH
from moejax.models import make
from moejax.models.decoder import Decoder
from moejax.sharding.mesh import num_token_shards


def group_tokens(config: Config) -> int:
  """Returns T."""
  length = config.data.sequence_length
  if config.moe.group_size == WHOLE_BATCH:
    return _microbatch(config) * length
  return config.moe.group_size or length


def make_model(config: Config, vocab_size: int) -> Decoder:
  """Returns the model of training, with groups independent of the batch size."""
  moe = copy.deepcopy(config.moe)
  if moe.group_size == WHOLE_BATCH:
    moe.group_size = group_tokens(config)
  return make.make_model(config.model, moe, vocab_size=vocab_size)


def batch_size(
  config: Config, mesh: Mesh, factors: Sequence[float | None], wanted: int = 0
) -> int:
  """Returns the sequences per evaluation batch, such that all groups are whole.

  Args:
    config: of the run, with its overrides.
    mesh: of the evaluation.
    factors: the capacity factors; if all are None, groups do not matter.
    wanted: minimum; 0 means the training microbatch.
  """
  shards = num_token_shards(mesh)
  multiple = shards
  if not config.moe.dense_twin and any(factor is not None for factor in factors):
    # Under gspmd, devices share groups, as in training.
    devices = 1 if config.moe.exchange == "gspmd" else shards
    for length in {config.data.sequence_length, target_length(config.data)}:
      tokens = (config.moe.group_size or length) * devices
      if config.moe.group_size == WHOLE_BATCH:
        tokens = group_tokens(config) * devices
      multiple = math.lcm(multiple, tokens // math.gcd(tokens, length))
  return -(-(wanted or _microbatch(config)) // multiple) * multiple


def least_factor(model: Any) -> float | None:
  """Returns None (dropless), except for routers that need a capacity."""
  needs_capacity = model.moe_layers and model.router.needs_capacity
  return model.moe.eval_capacity_factor if needs_capacity else None


def encoder_factor(model: Any) -> float | None:
  """Returns the factor under which an encoder reads a prompt of any length.

  None (dropless), unless the capacity is a fixed number of slots for any length.
  """
  if model.moe.capacity_convention == "slots":
    return model.moe.eval_capacity_factor
  return least_factor(model)


def _microbatch(config: Config) -> int:
  return config.train.batch_size // config.train.accumulation
