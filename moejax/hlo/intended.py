"""The collectives that a train step should have, and why.

A missing axis in a sharding rule raises no error: the compiler silently moves what it
must. So the compiled collectives are compared with this list.
"""

from moejax.config import Config
from moejax.hlo.parse import Collective
from moejax.sharding.mesh import BY_HAND, NEWTON_SCHULZ, TOKEN_AXES

_NO_SCATTER = "gradients of weights (a CPU has no reduce-scatter pass)"
"""XLA:CPU keeps an all-reduce even where each device uses only part of the result."""


_FAR_BELOW = 8
"""A buffer this many times smaller than an expert's matrix does not count as one."""

_EVENED_OUT = "edges of a padded reduce-scatter (the TPU compiler's)"
_LARGEST_EDGE = 1 << 26


def reason(collective: Collective, config: Config, platform: str = "") -> str:
  """Returns why a collective is there; empty if nothing requires it.

  Args:
    collective: from `hlo.Program.collectives`.
    config: of the run whose train step was compiled.
    platform: compile target: cpu, gpu or tpu; if empty, nothing is excused.
  """
  axes = set(collective.axis.split(","))
  match collective.kind:
    case "all-reduce":
      small = collective.bytes <= _small(config)
      return _all_reduce(axes, collective, small, platform)
    case "all-gather" if axes <= {"fsdp", "tensor"} and _is_muon(collective, config):
      return "matrices for Newton-Schulz"
    case "all-gather" if axes == {"fsdp"}:
      return "weights for use"
    case "reduce-scatter" if axes == {"fsdp"}:
      return "gradients of weights"
    case "all-to-all" | "ragged-all-to-all" if axes == {"expert"}:
      return "tokens to experts and back"
    case "collective-permute" if platform == "tpu" and not collective.source:
      # The compiler pads what it scatters to whole tiles, then evens out the shards.
      return _EVENED_OUT if collective.bytes <= _LARGEST_EDGE else ""
    case "all-gather" | "reduce-scatter" if axes == {"expert"}:
      return _over_experts(collective, config)
  return ""


def _is_muon(collective: Collective, config: Config) -> bool:
  return config.optimizer.name == "muon" and NEWTON_SCHULZ in collective.operation


def _small(config: Config) -> int:
  """Returns the most bytes of an all-reduce over fsdp that counts as sums and norms, not
  as a matrix: a few vectors of D numbers, which the compiler may merge."""
  return max(1 << 16, 64 * config.model.width)


def _all_reduce(
  axes: set[str], collective: Collective, small: bool, platform: str
) -> str:
  if axes == {"tensor"}:
    return "partial sums over a cut width"
  if "tensor" in axes and not small:
    return ""
  if "fsdp" in axes and not small:
    # Gradients of weights sharded over fsdp should be reduce-scattered. For experts
    # that is done by hand, so no compiler is excused.
    by_hand = BY_HAND in collective.operation
    return "" if platform != "cpu" or by_hand else _NO_SCATTER
  if axes <= {*TOKEN_AXES, "tensor"}:
    return "sums over tokens: gradients, losses, statistics"
  return ""


def _over_experts(collective: Collective, config: Config) -> str:
  """Returns a reason if the exchange sees all tokens; none for expert weights."""
  one = config.model.width * config.moe.fine_hidden * 2
  if not collective.source and _FAR_BELOW * collective.bytes < one:
    # Across slices the compiler drops source lines and sums by scatter, then gather.
    return "sums over tokens, in two steps, or gates (ragged)"
  if BY_HAND in collective.operation and config.moe.exchange in (
    "auto",
    "ring",
    "ragged",
  ):
    return "tokens of the expert axis (ring), loads (ragged), rows (ragged on a CPU)"
  return ""
