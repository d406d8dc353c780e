"""Chooses the devices for a config, or raises one clear error, before compiling.

A mesh with a free axis (-1) takes as many devices as evenly divide its batch and routing
groups: the default config runs on one device and on eight. A fully specified mesh runs
as given or not at all. Every process contributes the same number of devices, so that
none is idle.

Letters: B sequences of a microbatch, S sequence.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from moejax.config import text as config_text
from moejax.config.check import validate
from moejax.config.exchange_rule import choose
from moejax.config.mesh import AXES, mesh_shape, token_shards
from moejax.config.schema import Config
from moejax.config.spans import target_length
from moejax.config.text import named
from moejax.errors import ConfigError


def choose_devices(config: Config, devices: Sequence[Any]) -> tuple[list[Any], str]:
  """Returns the devices that a run uses: all, or as many as the config divides over.

  Args:
    config: validated.
    devices: of all processes.

  Returns:
    The devices, in the given order; and one line on why some are left out, empty if none
    are.

  Raises:
    ConfigError: no number of devices fits, or a fully specified mesh does not fit.
  """
  problem = _misfit(config, len(devices))
  if problem is None:
    _check_dispatcher(config, len(devices))
    return list(devices), ""
  owners = [device.process_index for device in devices]
  counts = {owner: owners.count(owner) for owner in set(owners)}
  share = _share(config, list(counts.values()))
  if share is None:
    raise ConfigError(f"{problem} {_remedy(config, list(counts.values()))}")
  chosen = [d for i, d in enumerate(devices) if owners[:i].count(owners[i]) < share]
  _check_dispatcher(config, len(chosen))
  each = f" ({share} of each process)" if len(counts) > 1 else ""
  line = f"Using {len(chosen)} of {len(devices)} devices{each}: {problem}"
  changes = _changes(config, len(devices))
  wider = next((c for c in changes if _fits_all(config, c, len(devices))), None)
  if wider is not None:
    line += f" All are used with {_as_flags(wider)}."
  return chosen, line


def validate_devices(config: Config, num_devices: int) -> None:
  """Rejects a config that does not run on exactly `num_devices` devices.

  Raises:
    ConfigError: the mesh's product is not `num_devices`, or an axis does not divide
      the dimension it shards. Sizes that depend on the vocabulary are checked when
      the parameters get their shardings.
  """
  problem = _misfit(config, num_devices)
  if problem is not None:
    raise ConfigError(f"{problem} {_remedy(config, [num_devices], exactly=True)}")
  _check_dispatcher(config, num_devices)


def misfit(config: Config, num_devices: int) -> str | None:
  """Returns why `validate_devices` rejects a config, without a remedy, which takes much
  longer to find; None if it does not."""
  problem = _misfit(config, num_devices)
  if problem is None:
    try:
      _check_dispatcher(config, num_devices)
    except ConfigError as error:
      return str(error)
  return problem


def _check_dispatcher(config: Config, num_devices: int) -> None:
  """Rejects an exchange or dispatcher that cannot run, before compiling."""
  # Routers import jax, which this check needs only with several devices.
  from moejax.config.router import make_router, num_selected

  if config.moe.dense_twin or num_devices == 1:
    return
  shape = mesh_shape(config.mesh, num_devices)
  size: dict[str, int] = dict(zip(AXES, shape, strict=True))
  groups = _num_groups(config, config.data.sequence_length)
  kind, _ = choose(
    config.moe.exchange,
    config.moe.dispatcher,
    devices=size["expert"],
    token_shards=token_shards(size),
    num_groups=groups,
    num_selected=num_selected(config.moe),
    capacity=config.moe.capacity_factor is not None,
    mixes=make_router(config.moe).mixes,
  )
  own, parts = groups // token_shards(size), config.moe.exchange_chunks
  if kind == "ragged" and own % parts:
    raise ConfigError(
      f"{named(config, 'moe.exchange_chunks')} does not divide the {own} routing "
      "group(s) of a device, which are sent in equal parts. Use "
      f"--config.moe.exchange_chunks={math.gcd(own, parts)}."
    )


def _share(config: Config, counts: Sequence[int]) -> int | None:
  """Returns the most devices per process that fit; None without a free axis or a fit."""
  if not has_free_axis(config):
    return None
  fitting = (
    share
    for share in range(min(counts), 0, -1)
    if _misfit(config, share * len(counts)) is None
  )
  return next(fitting, None)


def has_free_axis(config: Config) -> bool:
  """Returns whether an axis of the mesh takes what devices the others leave."""
  return any(getattr(config.mesh, axis) == -1 for axis in AXES)


def _misfit(config: Config, num_devices: int) -> str | None:
  """Returns why the config cannot run on `num_devices` devices; None if it can."""
  try:
    shape = mesh_shape(config.mesh, num_devices)
  except ConfigError as error:
    return str(error)
  size: dict[str, int] = dict(zip(AXES, shape, strict=True))
  return (
    _undivided_batch(config, size)
    or _undivided_groups(config, size)
    or _undivided_model(config, size)
  )


def _undivided_batch(config: Config, size: dict[str, int]) -> str | None:
  shards = token_shards(size)
  micro = config.train.batch_size // config.train.accumulation
  if micro % shards:
    return (
      f"{named(config, 'train.batch_size', 'train.accumulation')}: a microbatch has "
      f"{micro} sequences, which {shards} devices (data {size['data']} x fsdp "
      f"{size['fsdp']} x expert {size['expert']}) cannot share equally."
    )


def _num_groups(config: Config, length: int) -> int:
  """Returns the number of routing groups of a microbatch of rows of this length."""
  tokens = config.train.batch_size // config.train.accumulation * length
  return 1 if config.moe.group_size == -1 else tokens // (config.moe.group_size or length)


def _undivided_groups(config: Config, size: dict[str, int]) -> str | None:
  """Checks that groups divide over devices; exempt: dense twins and exchange gspmd."""
  if config.moe.dense_twin or config.moe.exchange == "gspmd":
    return None
  shards = token_shards(size)
  for length in sorted({config.data.sequence_length, target_length(config.data)}):
    groups = _num_groups(config, length)
    if groups % shards:
      return (
        f"{named(config, 'moe.group_size')} makes {groups} routing group(s) of a "
        f"microbatch, which {shards} devices cannot share equally."
      )


def _undivided_model(config: Config, size: dict[str, int]) -> str | None:
  for axis, name, extent in _cuts(config):
    if extent % size[axis]:
      return (
        f"--config.mesh.{axis}={size[axis]} does not divide --config.{name} ({extent})."
      )


def _cuts(config: Config) -> list[tuple[str, str, int]]:
  """Returns the dimensions each axis shards, except the batch: (axis, field, extent)."""
  model, moe = config.model, config.moe
  cuts = [
    ("fsdp", "model.width", model.width),
    ("tensor", "model.num_heads", model.num_heads),
    ("tensor", "model.num_kv_heads", model.num_kv_heads or model.num_heads),
    ("tensor", "model.hidden", model.hidden),
    ("tensor", "moe.hidden", moe.fine_hidden),
  ]
  if model.attention == "latent":
    cuts += [("fsdp", f"model.{n}", getattr(model, n)) for n in ("q_rank", "kv_rank")]
  if not moe.dense_twin:
    cuts.append(("expert", "moe.num_experts", moe.fine_experts))
    cuts.append(("tensor", "moe.shared_hidden", moe.shared_width))
  return cuts


def _remedy(config: Config, counts: Sequence[int], *, exactly: bool = False) -> str:
  """Returns a recommendation of flags that run on these devices; each was tried.

  Args:
    config: one that does not run on them.
    counts: devices of each process.
    exactly: whether it must use all of the devices, not only some.
  """

  def helps(change: dict[str, Any]) -> bool:
    if exactly:
      return _fits_all(config, change, sum(counts))
    return _runs(config, change, counts)

  fitting = [change for change in _changes(config, sum(counts)) if helps(change)]
  if not fitting:
    return "Use another number of devices, or another --config.mesh."
  flags = _as_flags(fitting[0])
  gspmd = {"moe.exchange": "gspmd"}
  if fitting[0] != gspmd and helps(gspmd):
    flags += (
      ", or --config.moe.exchange=gspmd, under which devices gather each other's logits"
    )
  return f"Use {flags}."


def _as_flags(change: dict[str, Any]) -> str:
  return " ".join(f"--config.{name}={value}" for name, value in change.items())


def _fits_all(config: Config, change: dict[str, Any], num_devices: int) -> bool:
  """Returns whether a change makes the config run on all devices."""
  changed = _changed(config, change)
  return changed is not None and misfit(changed, num_devices) is None


def _runs(config: Config, change: dict[str, Any], counts: Sequence[int]) -> bool:
  changed = _changed(config, change)
  if changed is None:
    return False
  if misfit(changed, sum(counts)) is None:
    return True
  share = _share(changed, counts)
  return share is not None and misfit(changed, share * len(counts)) is None


def _changed(config: Config, change: dict[str, Any]) -> Config | None:
  """Returns the config with a change; None if that is invalid."""
  config = copy.deepcopy(config)
  for name, value in change.items():
    config_text.set_field(config, name, value)
  try:
    validate(config)
  except ConfigError:
    return None
  return config


def _changes(config: Config, num_devices: int) -> Iterator[dict[str, Any]]:
  """Yields changes that may help, the smallest first; `_runs` checks them."""
  if not has_free_axis(config):
    yield from ({f"mesh.{axis}": -1} for axis in AXES)
  for axis, _, extent in _cuts(config):
    # Sizes that divide the extent, those nearest to the given one first; larger ones only
    # if the given one does not divide it.
    asked = abs(getattr(config.mesh, axis))
    most = min(extent, num_devices) if extent % asked else asked
    sizes = (size for size in range(1, most + 1) if extent % size == 0)
    for size in sorted(sizes, key=lambda size: (abs(size - asked), size)):
      yield {f"mesh.{axis}": size}
  # Pure data parallelism (one replica per device) fits any model.
  replicas = {"mesh.data": -1} | {f"mesh.{axis}": 1 for axis in AXES[1:]}
  unit = num_devices * config.train.accumulation
  batch = -(-config.train.batch_size // unit) * unit
  for mesh, size in itertools.product(({}, replicas), (config.train.batch_size, batch)):
    for group in _group_sizes(config, size // unit):
      change = mesh | {"train.batch_size": size, "moe.group_size": group}
      yield {n: v for n, v in change.items() if v != config_text.get_field(config, n)}


def _group_sizes(config: Config, sequences: int) -> Iterator[int]:
  """Yields the group size itself, then sizes that divide the tokens of a device."""
  size, length = config.moe.group_size, config.data.sequence_length
  yield size
  if sequences:
    yield math.gcd(max(size, 0), sequences * length)
  yield math.gcd(max(size, 0), length)
  yield 0
