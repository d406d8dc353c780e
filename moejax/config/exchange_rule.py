"""The rule that chooses layout and exchange of a layer; no devices or arrays.

Used by the layer itself and by the check of the config before compiling. Layouts are
described in `moejax.dispatch`, exchanges in `moejax.exchange`.

Letters: P devices of the expert axis, K choices per token.
"""

from moejax.errors import ConfigError

CARRIES = {
  "none": ("einsum", "gather", "grouped"),
  "all_to_all": ("einsum", "gather"),
  "ragged": ("grouped",),
  "ring": ("einsum", "gather", "grouped"),
  "gspmd": ("einsum",),
}
"""The dispatchers whose rows each exchange carries."""

_WHY_NOT = {
  "all_to_all": "it sends slots, but {} has any number of rows",
  "ragged": "it sends sorted rows, but {} has slots",
  "gspmd": "it runs on dense weights, which {} does not have",
}


def choose(
  exchange: str,
  dispatcher: str,
  *,
  num_selected: int,
  capacity: bool,
  mixes: bool = False,
  devices: int = 1,
  token_shards: int = 1,
  num_groups: int = 1,
  platform: str = "cpu",
) -> tuple[str, str]:
  """Returns the exchange and the dispatcher of a layer, neither of them "auto".

  Exchange auto is gspmd where groups do not divide over the devices, and "none" without
  an expert axis. Otherwise slots with a capacity use all_to_all. `grouped`, and dropless
  routing, which has no slots, use ring if P <= K, since a token then visits nearly every
  device and no buffer can overflow. If P > K they use ragged, which carries only sorted
  rows; other dispatchers use ring.

  Dispatcher auto is that of the exchange. Without an exchange, `grouped` runs only the
  rows that exist, and is fastest on CPU, with capacity and dropless. On an accelerator it
  needs a ragged matmul, which pays off when dropless. With a capacity, the batched matmul
  of `gather` has static shapes, which suit accelerators.

  Args:
    exchange: --config.moe.exchange.
    dispatcher: --config.moe.dispatcher.
    num_selected: K.
    capacity: whether experts have slots.
    mixes: whether the router mixes tokens, which only einsum can.
    devices: P, of the expert axis.
    token_shards: number of devices that the tokens are sharded over.
    num_groups: routing groups on all of them.
    platform: of the devices: cpu, gpu or tpu.

  Raises:
    ConfigError: the exchange cannot carry this routing or this dispatcher.
  """
  for flag, value, known in (
    ("exchange", exchange, CARRIES.keys() - {"none"}),
    ("dispatcher", dispatcher, set(CARRIES["none"])),
  ):
    if value not in known | {"auto"}:
      choices = ", ".join(["auto", *sorted(known)])
      raise ConfigError(f"--config.moe.{flag}={value} is unknown: use {choices}.")
  problem = unmixable(dispatcher, mixes)
  if problem is not None:
    raise ConfigError(problem)
  asked = "einsum" if mixes else dispatcher
  divided = num_groups % token_shards == 0
  kind = exchange
  if exchange == "auto":
    kind = _auto_exchange(asked, divided, devices, num_selected, capacity)
  if kind != "gspmd" and not divided:
    raise ConfigError(
      f"--config.moe.exchange={exchange}: {num_groups} routing groups do not divide "
      f"evenly over {token_shards} devices. Use gspmd or auto, or another "
      "--config.moe.group_size."
    )
  if kind != "gspmd" and devices == 1:
    kind = "none"
  if kind == "all_to_all" and not capacity:
    raise ConfigError(
      "--config.moe.exchange=all_to_all sends slots, but dropless has none. Use auto, or "
      "give --config.moe.capacity_factor."
    )
  if asked == "auto":
    return kind, _auto_dispatcher(kind, platform, capacity)
  if asked not in CARRIES[kind]:
    raise ConfigError(_refusal(exchange, kind, asked, capacity, mixes, divided))
  return kind, asked


def unmixable(dispatcher: str, mixes: bool) -> str | None:
  """Returns why a dispatcher cannot run a router that mixes tokens; None if it can."""
  if not mixes or dispatcher in ("auto", "einsum"):
    return None
  return (
    f"--config.moe.dispatcher={dispatcher} moves whole tokens, but this router mixes "
    "them into slots. Use einsum or auto."
  )


def buffer_factor(
  bound: float | None, *, devices: int, num_experts: int, num_selected: int | None
) -> float:
  """Returns the room for received rows under ragged, as a multiple of an even load.

  A device receives at most all rows of every device. Where tokens choose, it receives at
  most min(K, L) of each token's K rows, for its L = E/P experts, since a token visits an
  expert once.

  Args:
    bound: --config.moe.exchange_buffer.
    devices: P.
    num_experts: E.
    num_selected: K; None if experts choose tokens.
  """
  most = float(devices)
  if num_selected is not None:
    most *= min(num_selected, num_experts // devices) / num_selected
  return most if bound is None else min(most, bound)


def _auto_exchange(
  dispatcher: str, divided: bool, devices: int, num_selected: int, capacity: bool
) -> str:
  if not divided:
    return "gspmd"
  if capacity and dispatcher != "grouped":
    return "all_to_all"
  if devices > num_selected and dispatcher in CARRIES["ragged"] + ("auto",):
    return "ragged"
  return "ring"


def _auto_dispatcher(kind: str, platform: str, capacity: bool) -> str:
  if kind == "none":
    return "grouped" if platform == "cpu" or not capacity else "gather"
  return {"all_to_all": "gather", "gspmd": "einsum"}.get(kind, "grouped")


def _refusal(
  exchange: str, kind: str, dispatcher: str, capacity: bool, mixes: bool, divided: bool
) -> str:
  """Returns why an exchange does not carry a dispatcher's rows, and which one does."""
  others = [
    name
    for name, carried in CARRIES.items()
    if dispatcher in carried
    and name != "none"
    and (capacity or name != "all_to_all")
    and (divided or name == "gspmd")
  ]
  what = (
    "a router that mixes tokens" if mixes else f"--config.moe.dispatcher={dispatcher}"
  )
  through = f" (by {kind})" if exchange == "auto" else ""
  ways = [] if mixes else ["--config.moe.dispatcher=auto"]
  if others:
    ways.append(f"--config.moe.exchange={' or '.join(others)}")
  return (
    f"{what} does not run with --config.moe.exchange={exchange} on this mesh{through}: "
    f"{_WHY_NOT[kind].format(dispatcher)}. Use {' or '.join(ways)}."
  )
