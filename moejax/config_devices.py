"""A config that does not fit on the devices is one clear error, before any compile.

Letters: B sequences of a microbatch, S sequence.
"""

import math

from moejax.config import Config
from moejax.config_check import named
from moejax.errors import ConfigError


def validate_devices(config: Config, num_devices: int) -> None:
  """Refuses a config that does not fit on so many devices.

  Raises:
    ConfigError: the mesh's product is not `num_devices`, or an axis does not
      divide what it cuts. Sizes known only with the vocabulary are checked when
      the parameters get their shardings.
  """
  from moejax.parallel.mesh import AXES, TOKEN_AXES, mesh_shape

  shape = mesh_shape(config.mesh, num_devices)
  size: dict[str, int] = dict(zip(AXES, shape, strict=True))
  shards = math.prod(size[axis] for axis in TOKEN_AXES)
  micro = config.train.batch_size // config.train.accumulation
  if micro % shards:
    raise ConfigError(
      f"{named(config, 'train.batch_size', 'train.accumulation')}: a microbatch has "
      f"{micro} sequences, which {shards} devices (data {size['data']} x fsdp "
      f"{size['fsdp']} x expert {size['expert']}) cannot share equally. Make it a "
      f"multiple of {shards}."
    )
  if not config.moe.dense_twin:
    _groups_divide_devices(config, micro, shards)
    _dispatcher_fits_exchange(config, size, micro, shards)
  model, moe = config.model, config.moe
  cut = [
    ("fsdp", "model.width", model.width),
    ("tensor", "model.num_heads", model.num_heads),
    ("tensor", "model.num_kv_heads", model.num_kv_heads or model.num_heads),
    ("tensor", "model.hidden", model.hidden),
    ("tensor", "moe.hidden", moe.fine_hidden),
  ]
  if not moe.dense_twin:
    cut.append(("expert", "moe.num_experts", moe.fine_experts))
    cut.append(("tensor", "moe.shared_hidden", moe.shared_width))
  for axis, name, extent in cut:
    if extent % size[axis]:
      raise ConfigError(
        f"--config.mesh.{axis}={size[axis]} does not divide --config.{name} ({extent}). "
        f"Choose a divisor of {extent}, or change the model."
      )


def _num_groups(config: Config, micro: int) -> int:
  """Routing groups of a microbatch."""
  tokens, size = micro * config.data.sequence_length, config.moe.group_size
  return 1 if size == -1 else tokens // (size or config.data.sequence_length)


def _dispatcher_fits_exchange(
  config: Config, size: dict[str, int], micro: int, shards: int
) -> None:
  """A dispatcher asked for by name runs, or is refused before anything is compiled."""
  from moejax.layers.options import num_selected
  from moejax.parallel.expert_parallel import choose

  if math.prod(size.values()) == 1:
    return
  choose(
    config.moe.exchange,
    config.moe.dispatcher,
    devices=size["expert"],
    token_shards=shards,
    num_groups=_num_groups(config, micro),
    num_selected=num_selected(config.moe),
    capacity=config.moe.capacity_factor is not None,
    dense=config.moe.router == "soft",
  )


def _groups_divide_devices(config: Config, micro: int, shards: int) -> None:
  """Every device routes whole groups of its own, or the compiler is asked by name."""
  groups = _num_groups(config, micro)
  if groups % shards and config.moe.exchange != "gspmd":
    raise ConfigError(
      f"{named(config, 'moe.group_size')} makes {groups} routing group(s) of a "
      f"microbatch, which {shards} devices cannot share equally. Choose a group_size "
      "that divides what a device holds, or --config.moe.exchange=gspmd, under which "
      "devices gather each other's logits."
    )
