"""Which collectives a train step is meant to have, and why each is there.

A missing axis in a sharding rule makes no error: the compiler moves what it must, in
silence. So what it moves is compared with this list.
"""

from moejax.config import Config
from moejax.parallel.hlo import Collective
from moejax.parallel.mesh import TOKEN_AXES

_SMALL = 1 << 16
"""Bytes below which an all-reduce over fsdp is sums and norms, and no weight matrix."""


def reason(collective: Collective, config: Config) -> str:
  """Why it is there; empty if nothing asks for it.

  Args:
    collective: from `hlo.Program.collectives`.
    config: of the run whose train step was compiled.
  """
  axes = set(collective.axis.split(","))
  match collective.kind:
    case "all-reduce":
      return _all_reduce(axes, collective)
    case "all-gather" if axes == {"fsdp"}:
      return "weights for use"
    case "reduce-scatter" if axes == {"fsdp"}:
      return "gradients of weights"
    case "all-to-all" | "ragged-all-to-all" if axes == {"expert"}:
      return "tokens to experts and back"
    case "all-gather" | "reduce-scatter" if axes == {"expert"}:
      return _over_experts(collective, config)
    case "all-gather" if axes == {"tensor"} and "embedding" in collective.source:
      return "looking up a cut vocabulary"
  return ""


def _all_reduce(axes: set[str], collective: Collective) -> str:
  if axes == {"tensor"}:
    return "partial sums over a cut width"
  if "tensor" in axes and collective.bytes > _SMALL:
    return ""
  if "fsdp" in axes and collective.bytes > _SMALL:
    return ""  # Gradients of weights cut over fsdp should be reduce-scattered.
  if axes <= {*TOKEN_AXES, "tensor"}:
    return "sums over tokens: gradients, losses, statistics"
  return ""


def _over_experts(collective: Collective, config: Config) -> str:
  """Legitimate for exchanges that see all tokens; never for expert weights."""
  in_exchange = "parallel/" in collective.source
  if in_exchange and config.moe.exchange in ("auto", "ring", "ragged"):
    return "tokens of the expert axis (ring), loads (ragged), rows (ragged on a CPU)"
  return ""
