"""Resources of a compiled train step per device: memory, FLOPs, traffic, time.

The compiler reports memory, which shows whether the step fits. FLOPs and bytes are
counted in the optimised program, with loops multiplied out. Ragged exchanges and matmuls
are counted under even routing: the rows in use, not the capacity of the buffer.

Letters: P devices of an axis, D width, K choices per token, C slots per expert.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.config import Config
from moejax.config.exchange_rule import buffer_factor, choose
from moejax.config.mesh import AXES
from moejax.config.router import make_router, num_selected
from moejax.config.spans import target_length
from moejax.cost import flops as plan_flops
from moejax.cost.chips import Chip
from moejax.cost.parameters import resolve_vocab_size
from moejax.hlo import traffic
from moejax.hlo.parse import Program
from moejax.plan import topology as topology_lib
from moejax.plan.compile import CompiledStep
from moejax.plan.topology import Topology
from moejax.plan.wire_bound import wire_bound


def report(
  config: Config, topology: Topology, step: CompiledStep, chip: Chip
) -> dict[str, Any]:
  """Returns everything that `tools.compile_for` prints, as plain values.

  Args:
    config: validated.
    topology: the machine that `step` was compiled for.
    step: the compiled train step.
    chip: figures of one of its devices.
  """
  text, mesh = step.compiled.as_text(), step.mesh
  program, platform = Program(text), chip.family
  rows = traffic.rows_of(config, text, mesh.devices.shape, platform, topology.slices)
  network = Network(mesh.devices, topology, chip)
  for row in rows:
    row["network"], row["seconds"] = network.time_of(row)
  executed = program.flops(ragged_fraction(config, mesh))
  memory = memory_of(step, program)
  model = model_flops(config, mesh.size)
  bound = wire_bound(config, dict(mesh.shape))
  sent = sum(row["bytes_per_chip"] for row in rows)
  return {
    "topology": str(topology),
    "slices": topology.slices,
    "chips": mesh.size,
    "mesh": dict(mesh.shape),
    "memory_per_chip_bytes": memory,
    "hbm_bytes": chip.hbm_bytes,
    "fits": not chip.hbm_bytes or memory["total"] <= chip.hbm_bytes,
    "executed_flops_per_chip": executed,
    "model_flops_per_chip": model,
    "wire_bytes_per_chip": sent,
    "wire_bound_bytes_per_chip": bound,
    "collectives": rows,
    "roofline": roofline(executed, memory, rows, chip),
    "compile_seconds": step.seconds,
  }


def refused(topology: Topology, chips: int, chip: Chip, message: str) -> dict[str, Any]:
  """Returns the report of a step that the compiler could not fit in memory."""
  return {
    "topology": str(topology),
    "slices": topology.slices,
    "chips": chips,
    "hbm_bytes": chip.hbm_bytes,
    "fits": False,
    "refusal": message,
  }


def model_flops(config: Config, devices: int) -> float:
  """Returns model FLOPs per step and device, counting only causal attention pairs."""
  tokens = config.train.batch_size * target_length(config.data)
  vocab = resolve_vocab_size(config)
  return (
    plan_flops.flops_per_token(config, vocab, causal=True)["total"] * tokens / devices
  )


def ragged_fraction(config: Config, mesh: Mesh) -> float:
  """Returns the fraction of a device's row buffer in use under even routing."""
  devices, moe = mesh.shape["expert"], config.moe
  if moe.dense_twin or devices == 1:
    return 1.0
  kind, _ = choose(
    moe.exchange,
    moe.dispatcher,
    devices=devices,
    num_selected=num_selected(moe),
    capacity=moe.capacity_factor is not None,
    mixes=make_router(moe).mixes,
  )
  if kind == "ring":
    # The rows of all devices are gathered; each device computes its share.
    return 1.0 / devices
  if kind == "ragged":
    return 1.0 / buffer_factor(
      moe.exchange_buffer,
      devices=devices,
      num_experts=moe.fine_experts,
      num_selected=num_selected(moe) if make_router(moe).token_choice else None,
    )
  return 1.0


def memory_of(step: CompiledStep, program: Program) -> dict[str, int]:
  """Returns bytes per device by kind; `total` is what the compiler reserves.

  `saved_activations` are the stacks that the forward loop over layers keeps for the
  backward loop; `gradients` is a float32 copy of the parameters; `buffers` is the rest
  of the temporaries. `peak` is the maximum of live bytes, which the compiler cannot
  always pack without gaps. `host` is what `remat=offload` keeps in the host's memory; it
  is not part of the total.
  """
  analysis = step.compiled.memory_analysis()
  params = _device_bytes(step.state["params"])
  optimizer = _device_bytes(step.state["opt_state"])
  arguments, temporaries = (
    analysis.argument_size_in_bytes,
    analysis.temp_size_in_bytes,
  )
  shards = _shards(step.state["params"])
  gradients = sum(4 * math.prod(shard) for shard in shards)
  saved = program.stacked_bytes(set(shards))
  gradients = min(gradients, temporaries)
  saved = min(saved, temporaries - gradients)
  return {
    "parameters": params,
    "optimizer": optimizer,
    "other_arguments": max(0, arguments - params - optimizer),
    "saved_activations": saved,
    "gradients": gradients,
    "buffers": temporaries - gradients - saved,
    "arguments": arguments,
    "temporaries": temporaries,
    "total": arguments + temporaries,
    "peak": getattr(analysis, "peak_memory_in_bytes", 0),
    "host": getattr(analysis, "host_temp_size_in_bytes", 0),
  }


def _shards(tree: Any) -> list[tuple[int, ...]]:
  return [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(tree)]


def _device_bytes(tree: Any) -> int:
  leaves = jax.tree.leaves(tree)
  sizes = [leaf.dtype.itemsize for leaf in leaves]
  return sum(math.prod(s) * n for s, n in zip(_shards(tree), sizes, strict=True))


@dataclasses.dataclass
class Network:
  """The networks that the axes of a mesh span, and the time to send over them."""

  devices: np.ndarray
  """One array dimension per axis of `AXES`."""
  topology: Topology
  chip: Chip

  def time_of(self, row: traffic.Row) -> tuple[str, float]:
    """Returns a collective's network and a lower bound of its time in seconds.

    Rings send in both directions along every torus dimension that the axis spans; an
    all-to-all's bytes travel a quarter of each ring on average. Over the slow network,
    the devices of an island share a ring's traffic.
    """
    sent = row["bytes_per_chip"]
    if not self.chip.link_bandwidth:
      return "", 0.0
    if row.get("across"):
      return "dcn", sent / self.chip.slow_bandwidth
    group = self._group(row["axis"])
    islands = [topology_lib.island(self.topology, d) for d in group]
    exchange = "all-to-all" in row["kind"]
    if len(set(islands)) > 1:
      inside = islands.count(islands[0])
      share = 1 - inside / len(group) if exchange else 1 / inside
      return "dcn", sent * share / self.chip.slow_bandwidth
    if self.chip.family == "gpu":
      return "nvlink", sent / self.chip.link_bandwidth
    coordinates = np.array([d.coords for d in group])
    sides = [len(np.unique(column)) for column in coordinates.T]
    sides = [n for n in sides if n > 1] or [1]
    hops = sum(sides) / 4 if exchange else 1.0
    return "ici", sent * max(1.0, hops) / (2 * len(sides) * self.chip.link_bandwidth)

  def _group(self, axis: str) -> list[Any]:
    """Returns the devices of one group; all devices if groups do not follow axes."""
    named = axis.split(",")
    if not all(name in AXES for name in named):
      return list(self.devices.flat)
    index = tuple(slice(None) if name in named else slice(1) for name in AXES)
    return list(self.devices[index].flat)


def roofline(
  executed: float, memory: dict[str, int], rows: list[traffic.Row], chip: Chip
) -> dict[str, Any]:
  """Returns a step's seconds if all resources ran at peak and overlapped fully.

  Memory traffic is a lower bound: every argument is read and written once, every
  temporary written and read once.
  """
  if not chip.flops:
    return {}
  seconds = {
    "compute": executed / chip.flops,
    "hbm": 2 * (memory["arguments"] + memory["temporaries"]) / chip.hbm_bandwidth,
  }
  for row in rows:
    seconds[row["network"]] = seconds.get(row["network"], 0.0) + row["seconds"]
  bound_by = max(seconds, key=lambda name: seconds[name])
  return seconds | {"step_seconds": seconds[bound_by], "bound_by": bound_by}
