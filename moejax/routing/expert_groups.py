"""Choice within groups of experts, so that a token's experts are on few devices.

Letters: T tokens of one routing group, E experts, K choices per token.
Sources: DeepSeek-V2, arXiv:2405.04434, section 2.1.2 and equations 24 to 27.
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from moejax.errors import ConfigError
from moejax.options import count, option, weight
from moejax.routing.base import RouterInputs, Routing, SlotPolicy
from moejax.routing.capacity import assign
from moejax.routing.losses import communication_loss, device_loss
from moejax.routing.router import Router
from moejax.routing.scores import choose, limit_to_groups, pick, present, softmax

_MOST = 2**16
_MANY = "every token is scored against all of them"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedRouter(Router):
  """A router whose tokens choose within their best groups of experts."""

  num_expert_groups: int = option(
    1,
    "number of equal groups of experts; 1 means no limit",
    count(1, _MOST, _MANY, "at most num_experts"),
  )
  num_selected_groups: int = option(
    1,
    "number of best groups a token chooses from",
    count(1, _MOST, _MANY, "at most num_expert_groups"),
  )
  group_best: int = option(
    1,
    "number of best experts summed to a group's score: 1 DeepSeek-V2, 2 DeepSeek-V3",
    count(1, _MOST, _MANY, "at most the number of experts in a group"),
  )

  def limited(self, scores: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """Sets scores outside each token's best groups to -inf."""
    return limit_to_groups(
      scores, self.num_expert_groups, self.num_selected_groups, self.group_best
    )

  @property
  def expert_groups(self) -> int:
    return self.num_expert_groups

  def options_with_copies(self, copies: int) -> dict[str, Any]:
    # A group's score is a sum, in which every summand now occurs `copies` times.
    many = self.num_expert_groups > 1
    return {"group_best": self.group_best * copies} if many else {}

  def check(self, policy: SlotPolicy) -> None:
    super().check(policy)
    groups, selected = self.num_expert_groups, self.num_selected_groups
    if groups == 1:
      return
    experts, k, flag = (
      policy.num_experts,
      policy.num_selected,
      f"--config.moe.{self.name}.",
    )
    if experts % groups:
      raise ConfigError(
        f"{flag}num_expert_groups={groups} does not divide the {experts} experts. Choose "
        "a divisor."
      )
    if not 0 < selected <= groups:
      raise ConfigError(
        f"{flag}num_selected_groups={selected} is not in 1..{groups}, where {groups} is "
        "the number of groups."
      )
    if k > selected * experts // groups:
      raise ConfigError(
        f"--config.moe.num_selected={k} is more than the {selected * experts // groups} "
        f"experts of {selected} groups of {experts // groups}. Raise "
        f"{flag}num_selected_groups."
      )
    if self.group_best > experts // groups:
      raise ConfigError(
        f"{flag}group_best={self.group_best} is more than the {experts // groups} "
        "experts of a group. Lower it."
      )


def present_choices(
  inputs: RouterInputs, expert: Int[Array, "T K"]
) -> Bool[Array, "T K"] | None:
  """Returns which chosen experts take part in the step; None if all do.

  At least K experts always take part, but a token's best groups may hold fewer.
  """
  return None if inputs.present is None else inputs.present[expert]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupLimited(GroupedRouter):
  """Top-k within each token's best groups of experts (DeepSeek-V2).

  Gates are the softmax over ALL experts, times `policy.gate_scale`. Its losses are the
  device-level and communication balance losses over the groups.
  """

  name = "group_limited"
  summary = "top-k within a token's best groups of experts (DeepSeek-V2)"
  gates_are_probabilities = True

  device_weight: float = option(0.05, "weight of the balance between groups", weight())
  communication_weight: float = option(
    0.02, "weight of the balance of tokens received by groups", weight()
  )

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    probs = softmax(inputs.logits)
    scores = self.limited(present(inputs.logits, probs))
    expert = choose(scores, policy.num_selected)
    routing = assign(
      expert,
      pick(probs, expert),
      inputs.valid,
      probs,
      policy,
      inputs.key,
      wanted=present_choices(inputs, expert),
      scores=scores,
    )
    chosen, groups = routing.stats.chosen, self.num_expert_groups
    terms = {
      "device_loss": device_loss(probs, chosen, inputs.valid, groups),
      "communication_loss": communication_loss(probs, expert, inputs.valid, groups),
    }
    return dataclasses.replace(routing, losses=terms)

  def loss_weights(self) -> dict[str, float]:
    return {
      "device_loss": self.device_weight,
      "communication_loss": self.communication_weight,
    }
