"""Checks whether a run can fit in memory, from shapes alone, before allocating anything.

The estimate is a lower bound, so that a run that fits is never refused. Per device, it
counts the parameters, their gradients, the optimizer's moments, the input that every
repeated block keeps for its backward pass, and the logits. It omits attention scores,
expert buffers, hidden activations, temporaries and copies, so a real run needs more.
`tools.compile_for` asks the compiler instead.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.config import Config
from moejax.config.mesh import token_shards
from moejax.config.spans import target_length
from moejax.cost import parameters
from moejax.errors import UserError

_BYTES = {"float32": 4, "bfloat16": 2}
_MOMENTS = {"adamw": 2, "lion": 1, "adafactor": 0, "muon": 2}
"""float32 copies of the parameters; adafactor keeps only row and column moments."""

_MATRICES = ("attention", "dense", "experts", "shared_experts")
"""Parts of which muon keeps one copy. It keeps two of their few biases and gates, which
are counted as one, since the estimate is a lower bound."""

_CGROUP = pathlib.Path("/sys/fs/cgroup")
_MEMINFO = pathlib.Path("/proc/meminfo")


def least_bytes(
  config: Config,
  mesh: Mapping[str, int],
  vocab_size: int,
  frozen: Mapping[str, int] | None = None,
) -> dict[str, int]:
  """Returns the minimum bytes that a device needs, by kind.

  Args:
    config: validated.
    mesh: number of devices per axis.
    vocab_size: V.
    frozen: parameters without gradient and moments, by part.
  """
  counts, _ = parameters.count_parameters(config, vocab_size)
  trained = {part: n - (frozen or {}).get(part, 0) for part, n in counts.items()}
  cut = mesh["fsdp"] * mesh["tensor"]

  def on_device(experts: int, others: int) -> int:
    return -(-experts // (cut * mesh["expert"])) + -(-others // cut)

  here, learned = (
    on_device(n["experts"], n["total"] - n["experts"]) for n in (counts, trained)
  )
  moments = learned * _MOMENTS[config.optimizer.name]
  if config.optimizer.name == "muon":
    matrices = sum(trained[part] for part in _MATRICES)
    moments -= on_device(trained["experts"], matrices - trained["experts"])
  stored, computed = _BYTES[config.model.param_dtype], _BYTES[config.model.dtype]
  micro = config.train.batch_size // config.train.accumulation
  shards = token_shards(mesh)
  tokens = micro * target_length(config.data) // shards
  # With recomputation, only the input of a repeated unit (`every` layers) is kept.
  width, layers = config.model.width, config.model.num_layers // config.moe.every
  read = 0
  if config.model.kind == "encoder_decoder":
    every = config.moe.encoder_every or config.moe.every
    depth = (config.model.encoder_layers or config.model.num_layers) // every
    read = micro * config.data.sequence_length // shards * width * depth
  kept = tokens * (width * layers + vocab_size // mesh["tensor"]) + read
  return {
    "parameters": here * stored,
    "gradients": learned * stored,
    "moments": 4 * moments,
    "activations": kept * computed,
  }


def state_bytes(
  config: Config, vocab_size: int, frozen: Mapping[str, int] | None = None
) -> int:
  """Returns the minimum bytes of all devices' parameters and moments: a checkpoint.

  Args:
    config: validated.
    vocab_size: V.
    frozen: as for `least_bytes`.
  """
  one: dict[str, int] = dict.fromkeys(("data", "fsdp", "expert", "tensor"), 1)
  need = least_bytes(config, one, vocab_size, frozen)
  return need["parameters"] + need["moments"]


def check(
  config: Config,
  mesh: Any,
  devices: Sequence[Any],
  frozen: Mapping[str, int] | None = None,
) -> None:
  """Raises an error if a run cannot fit in memory.

  Args:
    config: validated.
    mesh: of the run.
    devices: of this process; CPU devices share the machine's memory.
    frozen: as for `least_bytes`.

  Raises:
    UserError: with the sizes and possible remedies.
  """
  vocab_size = parameters.resolve_vocab_size(config)
  if not config.model.vocab_size and config.data.tokenizer == "bpe":
    vocab_size = 0  # A small text gives a smaller one, known only with the data.
  need = least_bytes(config, dict(mesh.shape), vocab_size, frozen)
  on_cpu = devices[0].platform == "cpu"
  there = host_memory() if on_cpu else _device_memory(devices)
  total = sum(need.values())
  if there is None or total * (len(devices) if on_cpu else 1) <= there:
    return
  parts = ", ".join(f"{kind} {_gigabytes(size)}" for kind, size in need.items())
  where = "a device" if not on_cpu else f"each of {len(devices)} CPU device(s)"
  more = "" if on_cpu else ", cut the model over more devices with --config.mesh.fsdp"
  raise UserError(
    f"This run cannot fit: {where} needs at least {_gigabytes(total)} GB ({parts}; "
    f"buffers not counted), and there are {_gigabytes(there)} GB"
    f"{' in all' if on_cpu and len(devices) > 1 else ''}. Lower --config.model.width, "
    f"--config.moe.num_experts or --config.train.batch_size{more}, or try anyway with "
    "--ignore_memory."
  )


def host_memory() -> int | None:
  """Returns the bytes this process can still use, by machine and cgroup limits."""
  found = [
    size
    for size in (_machine_memory(), *_cgroup_memory())
    if size is not None and size > 0
  ]
  return min(found, default=None)


def _machine_memory() -> int | None:
  try:
    lines = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    kilobytes = [int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree")]
  except (OSError, ValueError, KeyError):
    return None
  return sum(kilobytes) << 10


def _cgroup_memory() -> list[int | None]:
  """Returns the cgroup v2 and v1 limits, ignoring usage, which may be page cache."""
  return [
    _number(_CGROUP / "memory.max"),
    _number(_CGROUP / "memory" / "memory.limit_in_bytes"),
  ]


def _number(file: pathlib.Path) -> int | None:
  try:
    return int(file.read_text())
  except (OSError, ValueError):  # "max" means no limit
    return None


def _device_memory(devices: Sequence[Any]) -> int | None:
  limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
  return min((limit for limit in limits if limit), default=None)


def _gigabytes(size: float) -> str:
  gigabytes = size / 1e9
  digits = 1 if gigabytes < 100 else 0
  return f"{gigabytes:,.{digits}f}" if math.isfinite(gigabytes) else "inf"
