"""Raises and clears alarms, logged step by logged step.

An alarm is raised when the worst layer was beyond the threshold in `patience` logged
steps in a row, and cleared once it is well inside. All processes decide the same, from
the same numbers; only the first one prints. The state is not saved: a run that resumes
raises an alarm that still holds again, after `patience` logged steps.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.alarms.measures import Deaths, Numbers, alarm_numbers
from moejax.alarms.rules import RULES, Rule, thresholds
from moejax.config import Config
from moejax.config import router as config_router
from moejax.routing.base import RouterStats
from moejax.routing.router import Router


@dataclasses.dataclass
class _State:
  streak: int = 0
  """Logged steps in a row beyond the threshold."""
  active: bool = False
  value: float = math.nan
  layer: int | None = None
  """Index in the model of the worst MoE layer; None for a number of the whole model."""


class Watch:
  """The alarms of one run."""

  def __init__(self, config: Config, routers: Sequence[Router], layers: Sequence[int]):
    """Starts with all alarms cleared.

    Args:
      config: validated.
      routers: of each MoE layer.
      layers: index of each MoE layer in the model, as messages name it.
    """
    self._config, self.routers, self._layers = config, routers, layers
    self._limits = thresholds(config)
    self._states = {name: _State() for name in self._limits}
    self._deaths = Deaths()
    self.raised = 0
    """Alarms raised so far, over all starts of the run once `go_on` was called."""
    self._counted: set[str] = set()

  def go_on(self, line: Mapping[str, Any]) -> None:
    """Continues the count from the last logged line of the run's earlier starts.

    An alarm raised there is raised again if it still holds, but not counted again.

    Args:
      line: of metrics.jsonl.
    """
    self.raised = int(line.get("alarms_raised", 0))
    self._counted = set(line.get("alarms", {}))

  @property
  def active(self) -> dict[str, dict[str, Any]]:
    """The raised alarms: the number of each, and the layer that it is from."""
    return {
      name: {"value": float(f"{state.value:.5g}"), "layer": state.layer}
      for name, state in self._states.items()
      if state.active
    }

  def update(
    self,
    step: int,
    stats: RouterStats,
    numbers: Numbers,
    *,
    aux: dict[str, float],
    loss: float,
  ) -> list[str]:
    """Takes a logged step; returns a line for each alarm that it raises or clears.

    Args:
      step: number of steps done.
      stats: of the step.
      numbers: from `measures.router_numbers`.
      aux: aux terms as they enter the loss: weighted, per token.
      loss: cross-entropy, nats per token.
    """
    found = alarm_numbers(
      stats,
      numbers,
      routers=self.routers,
      aux=aux,
      loss=loss,
      unavoidable=np.full(len(self._layers), unavoidable_drops(self._config)),
    )
    found["max_dead_steps"] = self._deaths(step, stats)
    return self.take(step, found)

  def take(self, step: int, found: Numbers) -> list[str]:
    """Takes the numbers of one logged step, by alarm; see `update`."""
    lines = []
    for rule in RULES:
      if rule.name in self._limits:
        lines += self._judge(rule, step, found[rule.name])
    return lines

  def _judge(self, rule: Rule, step: int, values: np.ndarray) -> list[str]:
    state, limit = self._states[rule.name], self._limits[rule.name]
    known = np.flatnonzero(np.isfinite(values))
    if not known.size:
      return []
    worst = known[(np.argmin if rule.is_floor else np.argmax)(values[known])]
    state.value = float(values[worst])
    state.layer = self._layers[worst] if rule.of_layers else None
    patience = 1 if rule.own_patience else self._config.alarms.patience
    bad = rule.is_bad(state.value, limit)
    state.streak = state.streak + 1 if bad else 0
    if not state.active and state.streak >= patience:
      state.active = True
      self.raised += rule.name not in self._counted
      self._counted.discard(rule.name)
      return [self._raised(rule, step, state, self.routers[worst])]
    is_good = rule.is_good(state.value, limit, self._config.alarms.release)
    if is_good:
      self._counted.discard(rule.name)
    if state.active and is_good:
      state.active = False
      return [f"Alarm {rule.name} cleared at step {step}: {self._says(rule, state)}."]
    return []

  def _raised(self, rule: Rule, step: int, state: _State, router: Router) -> str:
    limit = getattr(self._config.alarms, rule.name)
    remedy = rule.remedy(self._config.moe, router)
    return (
      f"ALARM {rule.name} at step {step}: {self._says(rule, state)} "
      f"(--config.alarms.{rule.name}={limit}). {remedy}"
    )

  def _says(self, rule: Rule, state: _State) -> str:
    text = rule.says.format(state.value)
    return text if state.layer is None else f"layer {state.layer}: {text}"


def unavoidable_drops(config: Config) -> float:
  """Returns the fraction of the assignments without a slot even at perfect balance."""
  moe = config.moe
  factor = moe.capacity_factor
  if factor is None:
    return 0.0
  if moe.capacity_convention == "per_token":
    factor /= config_router.num_selected(moe)
  return max(0.0, 1.0 - factor)
