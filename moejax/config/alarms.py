"""Thresholds of the alarms that a run raises while it trains; see docs/alarms.md.

Each `min_` or `max_` field is an alarm of that name, and `none` turns it off.
"""

from dataclasses import dataclass

from moejax.options import Range, count


@dataclass(kw_only=True, slots=True)
class AlarmConfig:
  """When a router counts as unhealthy. Only logged steps count (train.log_every)."""

  patience: int = 5
  """Number of logged steps in a row that must be beyond a threshold to raise an alarm."""
  release: float = 0.9
  """A max_ alarm is cleared below release * threshold, a min_ alarm above threshold /
  release."""
  max_load: float | None = 0.6
  """Load of a layer's busiest expert, before capacity: 0 is even, 1 is every token."""
  min_load_entropy: float | None = 0.5
  """Entropy of a layer's load over its experts, before capacity, over its maximum: 1 is
  even, 0 is one expert."""
  max_dead_steps: int | None = 200
  """Number of steps in a row in which no token chose an expert."""
  max_logit: float | None = 50.0
  """Largest absolute router logit of a token, mean over tokens."""
  max_gate: float | None = 0.995
  """Largest score of a token before renormalisation (softmax or sigmoid), mean over
  tokens: at 1 the router has no gradient."""
  max_bias_span: float | None = 1.0
  """Largest minus smallest selection bias of a layer. Sigmoid scores differ by less than
  1."""
  max_drops: float | None = 0.4
  """Fraction of a layer's assignments that is dropped, of those that its slots could hold
  if loads were even."""
  max_aux_share: float | None = 0.5
  """Largest weighted aux term, as a fraction of the cross-entropy."""
  min_gradient: float | None = 1e-4
  """Gradient of a layer's router over that of all other parameters, each the root mean
  square over its parameters."""
  max_gradient: float | None = 30.0
  """The same ratio, from above."""


_BELOW_EVEN = "0 means an even load"
_OFF = "none disables it"
_ROUNDING = "a float32 softmax is 0 or 1 far below this"
_LEARNING = "a router that learns can have a ratio of 1"

RANGES: dict[str, Range] = {
  "alarms.patience": count(1, 2**20, "no run logs that many steps"),
  "alarms.release": Range(0, 1, low_open=True, why_high="1 means no hysteresis"),
  "alarms.max_load": Range(0, 1, _BELOW_EVEN, why_high="1 means every token"),
  "alarms.min_load_entropy": Range(
    0, 1, "0 means one expert", why_high="1 means an even load"
  ),
  "alarms.max_dead_steps": Range(1, 2**31 - 1, _OFF),
  "alarms.max_logit": Range(0, 1e6, _OFF, low_open=True, why_high=_ROUNDING),
  "alarms.max_gate": Range(0, 1, _OFF, low_open=True),
  "alarms.max_bias_span": Range(
    0, 1e3, _OFF, low_open=True, why_high="scores lie between 0 and 1"
  ),
  "alarms.max_drops": Range(0, 1, "0 means any drop"),
  "alarms.max_aux_share": Range(
    0, 1e6, _OFF, low_open=True, why_high="nothing would be learned"
  ),
  "alarms.min_gradient": Range(0, 1, _OFF, low_open=True, why_high=_LEARNING),
  "alarms.max_gradient": Range(1, 1e9, _LEARNING, why_high=_OFF),
}
