"""Times the train steps of several configs in one process, in turn.

  python -m moejax.sweep.execution.step_times REQUEST_FILE

Started by timing.py, alone on the cores or the GPU of one run. Steps are interleaved, so
that a slow spell of the machine affects all shapes. Tokens are random and parameters
newly initialised: without a capacity, a trained router's uneven loads can make a step
slower or faster than here.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import files
from moejax.config import Config
from moejax.config import devices as config_devices
from moejax.config import text as config_text
from moejax.cost.flops import tokens_per_step
from moejax.cost.parameters import resolve_vocab_size
from moejax.hlo import traffic
from moejax.launch import host_memory
from moejax.models.loss import batch_shapes, to_devices
from moejax.models.make import make_model
from moejax.plan.compile import CompiledStep, compile_step
from moejax.platform import target_platform
from moejax.run import compilation_cache, provenance
from moejax.train import state as state_lib
from moejax.train.optimizer import make_optimizer

WARMUP_STEPS = 3
_SHARE_OF_MEMORY = 0.5
"""Fraction of the free memory that steps timed together may take."""


class Stepper:
  """A compiled train step that keeps its own state."""

  def __init__(self, config: Config):
    devices, _ = config_devices.choose_devices(config, jax.devices())
    self.config, self._state = config, None
    self.step: CompiledStep = compile_step(config, devices)
    analysis = self.step.compiled.memory_analysis()
    self.memory = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes

  def begin(self) -> None:
    """Makes the state, and takes the untimed steps."""
    config, mesh = self.config, self.step.mesh
    vocab_size = resolve_vocab_size(config)
    model = make_model(
      config.model, config.moe, vocab_size=vocab_size, frozen=config.train.frozen
    )
    optimizer = make_optimizer(
      config.optimizer,
      num_steps=config.train.num_steps,
      axes=model.logical_axes(),
      trained=model.trained(),
    )
    self._state = state_lib.make_init(model, optimizer, mesh)(jax.random.key(0))
    self._batch = to_devices(random_batch(config, vocab_size), mesh)
    for _ in range(WARMUP_STEPS):
      self.seconds()

  def seconds(self) -> float:
    """Takes a step and returns how long it took."""
    begin = time.perf_counter()
    with jax.set_mesh(self.step.mesh):
      self._state, metrics = self.step.compiled(self._state, self._batch)
    jax.block_until_ready((self._state, metrics))
    return time.perf_counter() - begin

  def end(self) -> None:
    """Frees the state."""
    self._state = self._batch = None

  def facts(self) -> dict[str, Any]:
    """Returns the compiler's figures for the step, per device."""
    mesh = self.step.mesh
    rows = traffic.rows_of(
      self.config, self.step.compiled.as_text(), mesh.devices.shape, target_platform()
    )
    sent = [r["bytes_per_chip"] for r in rows if "all-to-all" in r["kind"]]
    return {
      "compile_seconds": self.step.seconds,
      "peak_memory_bytes": self.memory,
      "all_to_all_bytes": sum(sent),
      "num_devices": mesh.size,
    }


def random_batch(config: Config, vocab_size: int) -> dict[str, np.ndarray]:
  """Returns a batch of random tokens, one document per sequence."""
  rng, batch = np.random.default_rng(0), {}
  for name, shape in batch_shapes(config).items():
    if name.endswith("segment_ids"):
      batch[name] = np.ones(shape, np.int32)
    elif name.endswith("positions"):
      positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
      batch[name] = np.ascontiguousarray(positions)
    else:
      batch[name] = rng.integers(0, vocab_size, shape).astype(np.int32)
  batch["targets"] = np.roll(batch["inputs"], -1, axis=1)
  return batch


def measure(configs: Mapping[str, Config], num_steps: int) -> dict[str, dict[str, Any]]:
  """Returns the times and facts of each config's step, by the configs' names.

  Args:
    configs: validated.
    num_steps: timed steps of each.
  """
  out = {}
  machine = {
    "device_kind": jax.devices()[0].device_kind,
    "cores": _num_cores(),
    "processor": compilation_cache.machine(),
    "versions": provenance.versions(),
    "revision": provenance.revision(),
  }
  for group in _groups(configs):
    times: dict[str, list[float]] = {name: [] for name in group}
    for stepper in group.values():
      stepper.begin()
    for _ in range(num_steps):
      for name, stepper in group.items():
        times[name].append(stepper.seconds())
    for name, stepper in group.items():
      stepper.end()
      tokens = tokens_per_step(stepper.config)
      out[name] = summary(times[name], tokens) | stepper.facts() | machine
  return out


def summary(seconds: Sequence[float], tokens: int) -> dict[str, Any]:
  """Returns a step's times in milliseconds, their percentiles, and its tokens/s.

  Args:
    seconds: time of each timed step; at least one.
    tokens: tokens of a step.
  """
  milliseconds = [1e3 * s for s in seconds]
  p50 = statistics.median(milliseconds)
  return {
    "step_ms": milliseconds,
    "p50": p50,
    "p90": float(np.percentile(milliseconds, 90)),
    "tokens_per_step": tokens,
    "tokens_per_second": tokens / (1e-3 * p50),
  }


def _groups(configs: Mapping[str, Config]) -> Iterator[dict[str, Stepper]]:
  """Compiles each step, and yields as many at once as fit in memory together."""
  group: dict[str, Stepper] = {}
  for name, config in configs.items():
    print(f"compiling {name} ...", flush=True)
    stepper = Stepper(config)
    taken = sum(other.memory for other in group.values())
    if group and taken + stepper.memory > _SHARE_OF_MEMORY * _free_bytes():
      yield group
      group = {}
    group[name] = stepper
  if group:
    yield group


def _free_bytes() -> float:
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  try:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  except (OSError, ValueError):
    return math.inf


def _num_cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def main(request_file: str) -> None:
  request = files.read_json(request_file)
  # With a cache, the compile time would be meaningless.
  jax.config.update("jax_enable_compilation_cache", False)
  host_memory.keep_freed_pages()
  configs = {
    name: config_text.from_dict(values) for name, values in request["configs"].items()
  }
  result = measure(configs, request["num_steps"])
  files.write_json(Path(request["output"]), result)


if __name__ == "__main__":
  main(sys.argv[1])
