"""Which collectives a train step is meant to have, and why each is there.

A missing axis in a sharding rule makes no error: the compiler moves what it must, in
silence. So what it moves is compared with this list.
"""

from moejax.config import Config
from moejax.hlo.parse import Collective
from moejax.sharding.mesh import BY_HAND, TOKEN_AXES

_NO_SCATTER = "gradients of weights (a CPU has no reduce-scatter pass)"
"""XLA:CPU leaves an all-reduce of which each device keeps a part as it is."""


_FAR_BELOW = 8
"""Times that something must be smaller than one matrix of an expert to be none."""

_EVENED_OUT = "edges of a padded reduce-scatter (the TPU compiler's)"
_LARGEST_EDGE = 1 << 26


def reason(collective: Collective, config: Config, platform: str = "") -> str:
  """Why it is there; empty if nothing asks for it.

  Args:
    collective: from `hlo.Program.collectives`.
    config: of the run whose train step was compiled.
    platform: that it was compiled for, cpu, gpu or tpu; empty excuses nothing.
  """
  axes = set(collective.axis.split(","))
  match collective.kind:
    case "all-reduce":
      small = collective.bytes <= _small(config)
      return _all_reduce(axes, collective, small, platform)
    case "all-gather" if axes == {"fsdp"}:
      return "weights for use"
    case "reduce-scatter" if axes == {"fsdp"}:
      return "gradients of weights"
    case "all-to-all" | "ragged-all-to-all" if axes == {"expert"}:
      return "tokens to experts and back"
    case "collective-permute" if platform == "tpu" and not collective.source:
      # The compiler pads what it scatters to whole tiles, and evens it out afterwards.
      return _EVENED_OUT if collective.bytes <= _LARGEST_EDGE else ""
    case "all-gather" | "reduce-scatter" if axes == {"expert"}:
      return _over_experts(collective, config)
  return ""


def _small(config: Config) -> int:
  """Bytes up to which an all-reduce over fsdp is sums and norms, and no matrix: a few
  vectors of D numbers, which the compiler may join into one."""
  return max(1 << 16, 64 * config.model.width)


def _all_reduce(
  axes: set[str], collective: Collective, small: bool, platform: str
) -> str:
  if axes == {"tensor"}:
    return "partial sums over a cut width"
  if "tensor" in axes and not small:
    return ""
  if "fsdp" in axes and not small:
    # Gradients of weights cut over fsdp should be reduce-scattered. Those of experts
    # are by hand, so for them no compiler is excused.
    by_hand = BY_HAND in collective.operation
    return "" if platform != "cpu" or by_hand else _NO_SCATTER
  if axes <= {*TOKEN_AXES, "tensor"}:
    return "sums over tokens: gradients, losses, statistics"
  return ""


def _over_experts(collective: Collective, config: Config) -> str:
  """Legitimate for exchanges that see all tokens; never for expert weights."""
  one = config.model.width * config.moe.fine_hidden * 2
  if not collective.source and _FAR_BELOW * collective.bytes < one:
    # Between slices compilers forget lines, and sum in steps: scattered, then gathered.
    return "sums over tokens, in two steps, or gates (ragged)"
  if BY_HAND in collective.operation and config.moe.exchange in (
    "auto",
    "ring",
    "ragged",
  ):
    return "tokens of the expert axis (ring), loads (ragged), rows (ragged on a CPU)"
  return ""
