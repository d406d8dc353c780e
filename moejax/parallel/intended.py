"""Which collectives a train step is meant to have, and why each is there.

A missing axis in a sharding rule makes no error: the compiler moves what it must, in
silence. So what it moves is compared with this list.
"""

from moejax.config import Config
from moejax.parallel.hlo import Collective
from moejax.parallel.mesh import TOKEN_AXES

_SMALL = 1 << 16
"""Bytes below which an all-reduce over fsdp is sums and norms, and no weight matrix."""


_NO_SCATTER = "gradients of weights (a CPU has no reduce-scatter pass)"
"""XLA:CPU leaves an all-reduce of which each device keeps a part as it is."""


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
      return _all_reduce(axes, collective, platform)
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


def _all_reduce(axes: set[str], collective: Collective, platform: str) -> str:
  if axes == {"tensor"}:
    return "partial sums over a cut width"
  if "tensor" in axes and collective.bytes > _SMALL:
    return ""
  if "fsdp" in axes and collective.bytes > _SMALL:
    # Gradients of weights cut over fsdp should be reduce-scattered. Those of experts
    # are by hand, so for them no compiler is excused.
    by_hand = "moejax/parallel/" in collective.source
    return "" if platform != "cpu" or by_hand else _NO_SCATTER
  if axes <= {*TOKEN_AXES, "tensor"}:
    return "sums over tokens: gradients, losses, statistics"
  return ""


def _over_experts(collective: Collective, config: Config) -> str:
  """Legitimate for exchanges that see all tokens; never for expert weights."""
  in_exchange = "parallel/" in collective.source
  if in_exchange and config.moe.exchange in ("auto", "ring", "ragged"):
    return "tokens of the expert axis (ring), loads (ragged), rows (ragged on a CPU)"
  return ""
