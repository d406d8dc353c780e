"""Lower bound of the bytes a train step sends under its sharding, for comparison.

Every matrix is gathered over `fsdp` for the forward and again for the backward pass, and
its gradient is reduce-scattered once, all in the compute dtype. Gradient shards are
all-reduced over replicas. Tokens go to experts and back, in the forward and backward
pass: once per assignment; with a capacity, once per slot (for sorted rows, whichever is
less); with a ring, once to every device.
"""

import copy
import math

import jax

from moejax.config import Config
from moejax.config.encoder import encoder_config
from moejax.config.exchange_rule import choose
from moejax.config.mesh import token_shards
from moejax.config.pattern import layer_pattern
from moejax.config.router import make_router, num_selected
from moejax.config.spans import target_length
from moejax.cost.parameters import resolve_vocab_size
from moejax.models import trained
from moejax.models.make import make_model
from moejax.routing.capacity import capacity_of
from moejax.sharding.rules import RULES, is_axes


def wire_bound(config: Config, mesh: dict[str, int]) -> float:
  """Returns the bytes that one device sends in a step.

  Args:
    config: validated, without soft routing.
    mesh: number of devices per axis.
  """
  width = _bytes(config)
  model = make_model(
    config.model,
    config.moe,
    vocab_size=resolve_vocab_size(config),
    frozen=config.train.frozen,
  )

  # Untrained parameters have no gradients to reduce.
  axes = trained.of_trained(model.logical_axes(), model.trained())
  shapes = trained.shapes(model.shapes(), model.trained())
  names_of = jax.tree.leaves(axes, is_leaf=is_axes)
  total = 0.0
  for names, leaf in zip(names_of, jax.tree.leaves(shapes), strict=True):
    spec = [axis for axis in RULES.spec(names) if axis is not None]
    size = width * math.prod(leaf.shape)
    for axis in spec:
      size /= mesh[axis] if axis != "fsdp" else 1
    if "fsdp" in spec:
      total += 3 * size * _part(mesh["fsdp"])
      size /= mesh["fsdp"]
    others = math.prod(n for a, n in mesh.items() if a not in spec and a != "tensor")
    total += 2 * size * _part(others)
  return total + exchange_bound(config, mesh)


def exchange_bound(config: Config, mesh: dict[str, int]) -> float:
  """Returns the bytes that one device exchanges with experts, forward and backward."""
  if config.model.kind == "encoder_decoder":
    encoder, decoder = encoder_config(config), copy.deepcopy(config)
    decoder.data.sequence_length = target_length(config.data)
    decoder.model.kind, decoder.data.objective = "decoder", "causal"
    return exchange_bound(encoder, mesh) + exchange_bound(decoder, mesh)
  moe, devices = config.moe, mesh["expert"]
  if moe.dense_twin or devices == 1:
    return 0.0
  kind, dispatcher = choose(
    moe.exchange,
    moe.dispatcher,
    num_selected=num_selected(moe),
    capacity=moe.capacity_factor is not None,
    mixes=make_router(moe).mixes,
    devices=devices,
  )
  layers = sum(layer_pattern(config.model.num_layers, moe).is_moe)
  shards = token_shards(mesh)
  tokens = config.train.batch_size * config.data.sequence_length
  size = moe.group_size or config.data.sequence_length
  size = tokens if size == -1 else size
  rows = size * num_selected(moe)
  capacity = capacity_of(
    size,
    moe.fine_experts,
    num_selected(moe),
    moe.capacity_factor,
    convention=moe.capacity_convention,
    min_capacity=moe.min_capacity,
  )
  if capacity is not None:
    slots = capacity * moe.fine_experts
    rows = min(rows, slots) if dispatcher == "grouped" else slots
  if kind == "ring":
    # Every token goes to every other device, whichever experts it chose.
    rows = devices * size
  per_device = tokens / size * rows / shards * config.model.width * _bytes(config)
  return 4 * layers * per_device * _part(devices)


def _part(devices: int) -> float:
  """Returns the fraction of a buffer that each device of a ring sends."""
  return (devices - 1) / devices


def _bytes(config: Config) -> int:
  return 2 if config.model.dtype == "bfloat16" else 4
