"""Makes a layer's router, slot policy and sizes from its configuration.

Shared by the layer, the check of the config and the parameter count.
"""

import dataclasses
from typing import Any

from moejax.config.schema import MoEConfig
from moejax.routing import registry
from moejax.routing.base import SlotPolicy
from moejax.routing.capacity import capacity_of
from moejax.routing.router import Router, Sizes

CONFIGURED: Any = "configured"
"""Default of calls: the configured capacity factor. A word, so that help() shows it."""


def make_router(moe: MoEConfig) -> Router:
  """Makes the chosen router, with its options.

  Raises:
    ConfigError: no such router, or an invalid value of an option.
  """
  return registry.make(moe.router, moe.router_options)


def num_selected(moe: MoEConfig) -> int:
  """Returns the router's K, counted in segments; all experts under router dense."""
  return make_router(moe).selected(moe.fine_experts, moe.fine_selected)


def num_present(moe: MoEConfig) -> int:
  """Returns the number of experts active in a training step: at least K."""
  # Rounded first: .29 of 100 is 28.999... in floats.
  out = int(round(moe.expert_dropout * moe.fine_experts, 6))
  return moe.fine_experts - min(out, moe.fine_experts - num_selected(moe))


def capacity(
  moe: MoEConfig, num_tokens: int, capacity_factor: float | None
) -> int | None:
  """Returns C of a group of `num_tokens`; None means dropless."""
  return capacity_of(
    num_tokens,
    moe.fine_experts,
    num_selected(moe),
    capacity_factor,
    convention=moe.capacity_convention,
    min_capacity=moe.min_capacity,
  )


def factor_of(moe: MoEConfig, asked: Any, *, train: bool) -> float | None:
  """Returns the capacity factor of a call: `asked`, unless that is `CONFIGURED`."""
  if asked is not CONFIGURED:
    return asked
  return moe.capacity_factor if train else moe.eval_capacity_factor


def slot_policy(moe: MoEConfig, capacity: int | None) -> SlotPolicy:
  """Returns the slot policy (choices per token, priority for slots) of a configuration.

  Args:
    moe: of the layer; its strings have passed `config.check.validate`.
    capacity: C, slots per expert; None means dropless.

  Returns:
    A policy whose num_experts and num_selected count fine-grained experts.
  """
  own = {"num_experts", "num_selected", "capacity", "ranking"}
  names = {f.name for f in dataclasses.fields(SlotPolicy)} - own
  return SlotPolicy(
    num_experts=moe.fine_experts,
    num_selected=num_selected(moe),
    capacity=capacity,
    **{name: getattr(moe, name) for name in names},
  )


def sizes(moe: MoEConfig, width: int, num_tokens: int) -> Sizes:
  """Returns the sizes of a layer in training.

  Args:
    moe: of the layer.
    width: D.
    num_tokens: T of one routing group.
  """
  return Sizes(
    width=width,
    num_experts=moe.fine_experts,
    num_selected=num_selected(moe),
    num_tokens=num_tokens,
    capacity=capacity(moe, num_tokens, moe.capacity_factor),
  )
