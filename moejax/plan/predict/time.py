"""Roofline estimate of a train step's time: what limits it, and what does not overlap.

  step = max(compute, memory traffic, overlapped wire of each network) + exposed wire

Compute runs at a given fraction of the chip's peak. Gathers of weights and sums of
gradients overlap with products, which do not wait for them. Exchanges of tokens and
partial sums do not overlap, since the next product needs them; but if slots are sent in
parts (`exchange_chunks`), all but one part overlap. The result is a bound to rank plans
by, not a measurement.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from moejax.config import Config
from moejax.cost.chips import Chip
from moejax.plan.predict.links import Span, joined, seconds
from moejax.plan.predict.load import Load
from moejax.plan.predict.memory import Memory
from moejax.plan.predict.wire import Sent

EFFICIENCY = 0.6
"""Fraction of a chip's peak at which products run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
  """Seconds of a step, by cause."""

  compute: float
  hbm: float
  networks: Mapping[str, float]
  """Communication that overlaps, by network: ici, nvlink or dcn."""
  exposed: float
  """Communication that nothing overlaps with."""

  @property
  def step(self) -> float:
    return max(self.compute, self.hbm, *self.networks.values(), 0.0) + self.exposed

  @property
  def bound_by(self) -> str:
    """Name of what takes longest."""
    parts = {"compute": self.compute, "hbm": self.hbm, **self.networks}
    parts["exposed wire"] = self.exposed
    return max(parts, key=lambda name: parts[name])


def step_time(
  config: Config,
  load: Load,
  memory: Memory,
  executed: float,
  rows: Sequence[Sent],
  spans: Mapping[str, Span],
  chip: Chip,
  *,
  efficiency: float = EFFICIENCY,
) -> StepTime:
  """Returns the time of a step.

  Args:
    config: validated.
    load: of one device.
    memory: of one device; everything in it is written and read once per microbatch,
      parameters and moments once per step.
    executed: FLOPs of one device.
    rows: what one device sends.
    spans: links of each mesh axis.
    chip: figures of a device, with a known peak.
    efficiency: fraction of the peak.
  """
  assert chip.flops, chip
  networks: dict[str, float] = {}
  exposed = 0.0
  for row in rows:
    span = joined([spans[axis] for axis in row.axis.split(",")])
    network, time = seconds(row.bytes, span, chip, exchange=row.kind == "all-to-all")
    hidden = 1.0 if row.overlaps else 0.0
    if row.purpose == "tokens":
      hidden = _hidden(config, load)
    networks[network] = networks.get(network, 0.0) + hidden * time
    exposed += (1 - hidden) * time
  fixed = memory.kinds["parameters"] + memory.kinds["moments"]
  moved = 2 * (fixed + load.microbatches * (memory.total - fixed))
  return StepTime(
    compute=executed / (chip.flops * efficiency),
    hbm=moved / chip.hbm_bandwidth,
    networks=networks,
    exposed=exposed,
  )


def _hidden(config: Config, load: Load) -> float:
  """Returns the share of an exchange that overlaps with products of other parts."""
  if load.exchange != "all_to_all":
    return 0.0
  return 1 - 1 / config.moe.exchange_chunks
