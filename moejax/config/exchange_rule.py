"""The rule that chooses how tokens of a layer are exchanged; no devices or arrays.

Used by the layer itself and by the check of the config before compiling. The exchanges
are described in `expert_parallel`.

Letters: P devices of the expert axis, K choices per token.
"""

from moejax.errors import ConfigError

CARRIED_AS = {
  "gspmd": "einsum",
  "all_to_all": "gather",
  "ragged": "grouped",
  "ring": "grouped",
}
"""The dispatcher whose layout each exchange sends: masks, slots or sorted rows."""


def choose(
  exchange: str,
  dispatcher: str,
  *,
  devices: int,
  token_shards: int,
  num_groups: int,
  num_selected: int,
  capacity: bool,
  dense: bool,
) -> str:
  """Returns the exchange of a layer: one of `CARRIED_AS`, or "none".

  `auto` uses gspmd for dense weights (Soft MoE), for the einsum dispatcher, and where
  groups do not divide over the devices; otherwise, without an expert axis, "none". With
  a capacity it uses all_to_all. Dropless uses ring if P <= K, since a token then visits
  nearly every device and no buffer can overflow, and ragged otherwise.

  Args:
    exchange: --config.moe.exchange.
    dispatcher: --config.moe.dispatcher.
    devices: P, of the expert axis.
    token_shards: number of devices that the tokens are sharded over.
    num_groups: routing groups on all of them.
    num_selected: K.
    capacity: whether experts have slots.
    dense: whether the router mixes tokens.

  Raises:
    ConfigError: the exchange does not support this routing or this dispatcher.
  """
  kind = exchange
  if exchange == "auto":
    if dense or dispatcher == "einsum" or num_groups % token_shards:
      kind = "gspmd"
    elif capacity:
      kind = "all_to_all"
    else:
      kind = "ring" if devices <= num_selected else "ragged"
  if kind != "gspmd" and (dense or num_groups % token_shards):
    reason = (
      "this router mixes tokens"
      if dense
      else f"{num_groups} routing groups do not divide over {token_shards} devices"
    )
    raise ConfigError(
      f"--config.moe.exchange={exchange}: {reason}. Use gspmd or auto, or another "
      "--config.moe.group_size."
    )
  if kind != "gspmd" and devices == 1:
    return "none"
  if kind == "all_to_all" and not capacity:
    raise ConfigError(
      "--config.moe.exchange=all_to_all sends slots, and dropless has none. Use ragged, "
      "ring or auto, or give --config.moe.capacity_factor."
    )
  if dispatcher not in ("auto", CARRIED_AS[kind]):
    carriers = [name for name, layout in CARRIED_AS.items() if layout == dispatcher]
    if not capacity:
      carriers = [name for name in carriers if name != "all_to_all"]
    another = f", or --config.moe.exchange={' or '.join(carriers)}" if carriers else ""
    raise ConfigError(
      f"--config.moe.dispatcher={dispatcher} does not run with --config.moe.exchange="
      f"{exchange} on this mesh: tokens travel by {kind}, which carries them as "
      f"dispatcher {CARRIED_AS[kind]} does. Use --config.moe.dispatcher=auto{another}."
    )
  return kind
