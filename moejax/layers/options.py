"""From a layer's configuration to its router's options: the one translation.

The layer that routes and the check that refuses a config both come here, so a
field that `MoEConfig` and `RouterOptions` share by name reaches both at once.
"""

import dataclasses

from moejax.config import MoEConfig
from moejax.routing import registry
from moejax.routing.base import RouterOptions


def num_selected(moe: MoEConfig) -> int:
  """K that the router sees: segments counted, and all experts under router dense."""
  return registry.selected(moe.router, moe.fine_experts, moe.fine_selected)


def num_present(moe: MoEConfig) -> int:
  """Experts that take part in a training step: all but a fixed number, at least K."""
  # Rounded first: .29 of 100 is 28.999... in floats.
  out = int(round(moe.expert_dropout * moe.fine_experts, 6))
  return moe.fine_experts - min(out, moe.fine_experts - num_selected(moe))


def router_options(moe: MoEConfig, capacity: int | None) -> RouterOptions:
  """The router's static choices under this configuration.

  Args:
    moe: of the layer. Its strings are those that `config_check.validate` let pass.
    capacity: C, slots per expert; None is dropless.

  Returns:
    Options whose num_experts and num_selected count fine-grained experts.
  """
  shared = {f.name for f in dataclasses.fields(RouterOptions)} - {"capacity"}
  given = {name: getattr(moe, name) for name in shared if hasattr(moe, name)}
  given["num_experts"] = moe.fine_experts
  given["num_selected"] = num_selected(moe)
  return RouterOptions(**given, capacity=capacity)
