"""Estimates the disk space that a run will need, before it begins."""

import os
import pathlib
import shutil
from collections.abc import Collection

from moejax.config import Config
from moejax.errors import UserError
from moejax.run import log_lines
from moejax.storage.paths import RunPath, in_bucket

_COMPRESSED = 0.8
"""Orbax compresses arrays, random numbers the least: never refuse a run that may fit."""

_OVERHEAD = 150_000
"""Bytes of a checkpoint in addition to its arrays: our metadata and Orbax's."""


def foresee(
  config: Config, workdir: RunPath, state_bytes: int, begun: Collection[int] = ()
) -> str:
  """Returns one line on the most that a run will store, and the free space.

  Args:
    config: validated.
    workdir: of the run; exists, unless in a bucket.
    state_bytes: bytes of one checkpoint's arrays.
    begun: steps of the existing checkpoints.

  Raises:
    UserError: the run will not fit on the disk.
  """
  state_bytes += _OVERHEAD
  copies = num_copies(config, len(begun))
  logs = log_lines.num_bytes(config)
  need = copies * state_bytes + logs
  parts = f"{copies} checkpoint{'s' * (copies > 1)} of {size(state_bytes)}"
  text = f"{workdir} will hold up to {size(need)}: {parts}, and {size(logs)} of logs"
  if in_bucket(workdir):
    return f"{text}."
  usage = shutil.disk_usage(os.fspath(workdir))
  if not usage.total:  # some network file systems do not report it
    return f"{text}."
  there = _stored(pathlib.Path(workdir))
  if _COMPRESSED * need > usage.free + there:
    raise UserError(
      f"--workdir={workdir} will hold up to {size(need)} ({parts}, one of them only "
      f"while it replaces another, and {size(logs)} of logs), and {size(usage.free)} are "
      f"free{f', in addition to the {size(there)} it already uses' if there else ''}. "
      f"Free some space, lower --config.train.keep_last={config.train.keep_last} or "
      f"--config.train.keep_best={config.train.keep_best}, or choose another disk."
    )
  return f"{text}; {size(usage.free)} are free."


def num_copies(config: Config, begun: int = 0) -> int:
  """Returns the most checkpoints that exist at once, including the one being written.

  Args:
    config: validated.
    begun: number of existing checkpoints.
  """
  train = config.train
  saves = 1 + (train.num_steps // train.checkpoint_every if train.checkpoint_every else 0)
  most = train.keep_last + train.keep_best + 1
  return min(most, saves + begun)


def size(num_bytes: float) -> str:
  """Returns a readable number of bytes: 8 kB, 130 MB, 2.5 GB, 1,240 GB."""
  for unit, scale in (("GB", 1e9), ("MB", 1e6)):
    if num_bytes >= scale:
      value = num_bytes / scale
      return f"{value:,.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
  return f"{num_bytes / 1e3:,.0f} kB"


def _stored(directory: pathlib.Path) -> int:
  """Returns the bytes on the disk of all files below a directory."""
  total = 0
  for parent, _, names in os.walk(directory):
    for name in names:
      try:
        total += os.lstat(os.path.join(parent, name)).st_blocks * 512
      except OSError:  # removed meanwhile
        continue
  return total
