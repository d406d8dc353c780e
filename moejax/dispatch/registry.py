"""The registry of dispatchers, by their names on the command line."""

from collections.abc import Mapping

from moejax.dispatch.base import Dispatcher
from moejax.dispatch.einsum import einsum
from moejax.dispatch.gather import gather
from moejax.dispatch.grouped import grouped
from moejax.errors import ConfigError

DISPATCHERS: Mapping[str, Dispatcher] = {
  "einsum": einsum,
  "gather": gather,
  "grouped": grouped,
}
SUMMARIES: Mapping[str, str] = {
  "einsum": "dense masks; slow and easy to shard",
  "gather": "slots by index; batched experts, empty slots cost as full ones",
  "grouped": "sorted rows; only kept assignments cost; capacity and dropless",
}
"""One line each, for --list=dispatchers."""


def resolve(
  name: str,
  *,
  platform: str = "cpu",
  capacity: int | None = None,
  dense: bool = False,
) -> Dispatcher:
  """Returns the dispatcher of this name; "auto" chooses one.

  The rule of auto: `grouped` runs only the rows that exist, and is fastest on CPU with
  capacity and dropless. On an accelerator it needs a ragged matmul, which pays off when
  dropless; with a capacity the batched matmul of `gather` has static shapes, which suit
  accelerators.

  Args:
    platform: of the devices that will run it: cpu, gpu or tpu.
    capacity: C, or None if dropless.
    dense: whether the routing has dense weights (Soft MoE), which only `einsum` reads.

  Raises:
    ConfigError: unknown dispatcher, or one that cannot run this routing.
  """
  if dense and name in ("gather", "grouped"):
    raise ConfigError(
      f"--config.moe.dispatcher={name} moves whole tokens, and this router mixes them "
      "into slots. Use einsum or auto."
    )
  if name == "auto" and dense:
    name = "einsum"
  if name == "auto":
    name = "grouped" if platform == "cpu" or capacity is None else "gather"
  if name not in DISPATCHERS:
    raise ConfigError(
      f"--config.moe.dispatcher={name} is unknown: use auto, {', '.join(DISPATCHERS)}."
    )
  return DISPATCHERS[name]
