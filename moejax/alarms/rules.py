"""The alarms of a router, each with a line on what is wrong and one on what to do.

An alarm has the name of the config field that holds its threshold
(`--config.alarms.NAME`): a router is healthy below it for `max_`, above it for `min_`.
docs/alarms.md has the table, and explains when each alarm misleads.
"""

import dataclasses
from collections.abc import Callable

from moejax.config import Config, MoEConfig
from moejax.config.text import get_field
from moejax.routing.router import Router


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """One alarm."""

  name: str
  says: str
  """What is wrong; `{:...}` is the number."""
  remedy: Callable[[MoEConfig, Router], str]
  """What to do about it, naming flags and their values."""
  of_layers: bool = True
  """Whether each MoE layer has its own number, or the whole model has one."""
  own_patience: bool = False
  """Whether the number itself counts steps, so that no patience is needed."""

  @property
  def is_floor(self) -> bool:
    """Whether numbers below the threshold are bad."""
    return self.name.startswith("min_")

  def is_bad(self, value: float, threshold: float) -> bool:
    """Returns whether a number is beyond the threshold; NaN never is."""
    return value < threshold if self.is_floor else value > threshold

  def is_good(self, value: float, threshold: float, release: float) -> bool:
    """Returns whether a number is far enough inside to end the alarm; NaN never is."""
    if self.is_floor:
      return value > threshold / release
    return value < threshold * release


def _flag(moe: MoEConfig, *names: str) -> str:
  """Returns flags of the MoE section with their values, for a remedy."""
  shown = [f"--config.moe.{name} (now {getattr(moe, name)})" for name in names]
  return " or ".join(shown)


def _balance(moe: MoEConfig, router: Router) -> str:
  if not router.learned:
    return f"Use another --config.moe.router: {router.name} does not learn."
  if router.balancer:
    flag = f"--config.moe.{router.name}.{router.balancer}"
    return f"Raise {flag} (now {getattr(router, router.balancer)})."
  if router.reads_field("balance_weight") and not router.by_sigmoid:
    return f"Raise {_flag(moe, 'balance_weight')}."
  return "Lower --config.optimizer.learning_rate."


def _capacity(moe: MoEConfig, router: Router) -> str:
  balance = _balance(moe, router)
  return f"Raise {_flag(moe, 'capacity_factor')}, or {balance[0].lower()}{balance[1:]}"


def _calm(moe: MoEConfig, router: Router) -> str:
  del router
  return f"Raise {_flag(moe, 'z_weight')}, or lower --config.optimizer.learning_rate."


def _soften(moe: MoEConfig, router: Router) -> str:
  del router
  flags = _flag(moe, "entropy_weight", "z_weight", "jitter")
  return f"Raise {flags}, or lower {_flag(moe, 'router_init_scale')}."


def _terms(moe: MoEConfig, router: Router) -> str:
  names = ["balance_weight", "z_weight", "entropy_weight"]
  own = [f"--config.moe.{router.name}.{name}" for name in router.loss_weights()]
  used = [name for name in names if getattr(moe, name)]
  return f"Lower {' or '.join([*filter(None, [_flag(moe, *used)]), *own])}."


def _slower_bias(moe: MoEConfig, router: Router) -> str:
  if not router.balancer:
    return f"Raise {_flag(moe, 'balance_weight')}, so that the bias has less to do."
  flag = f"--config.moe.{router.name}.{router.balancer}"
  now = getattr(router, router.balancer)
  return f"Lower {flag} (now {now}), or raise {_flag(moe, 'balance_weight')}."


RULES: tuple[Rule, ...] = (
  Rule(
    name="max_load",
    says=(
      "the load of the busiest expert is {:.2f}, where 0 is even and 1 means all tokens"
    ),
    remedy=_balance,
  ),
  Rule(
    name="min_load_entropy",
    says="the entropy of the load is {:.2f} of that of an even load",
    remedy=_balance,
  ),
  Rule(
    name="max_dead_steps",
    says="no token chose one of the experts for {:.0f} steps",
    remedy=_balance,
    own_patience=True,
  ),
  Rule(name="max_logit", says="the largest logit of a token is {:.1f}", remedy=_calm),
  Rule(
    name="max_gate",
    says="the largest score of a token is {:.4f}; at 1 it has no gradient",
    remedy=_soften,
  ),
  Rule(
    name="max_bias_span",
    says="selection biases differ by {:.2f}, and scores by less than 1",
    remedy=_slower_bias,
  ),
  Rule(
    name="max_drops",
    says="{:.0%} of the assignments that even loads would keep are dropped",
    remedy=_capacity,
  ),
  Rule(
    name="max_aux_share",
    says="the largest weighted aux term is {:.2f} of the cross-entropy",
    remedy=_terms,
    of_layers=False,
  ),
  Rule(
    name="min_gradient",
    says="the gradient of the router is {:.2g} of that of the other parameters",
    remedy=_soften,
  ),
  Rule(
    name="max_gradient",
    says="the gradient of the router is {:.3g} times that of the other parameters",
    remedy=_terms,
  ),
)


def thresholds(config: Config) -> dict[str, float]:
  """Returns the threshold of each alarm that is on, by its name."""
  found = {rule.name: get_field(config, f"alarms.{rule.name}") for rule in RULES}
  return {name: float(value) for name, value in found.items() if value is not None}
