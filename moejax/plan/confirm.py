"""Compiles a plan and compares what was predicted with the compiled program."""

from typing import Any

import jax

from moejax.config import Config
from moejax.config.mesh import AXES
from moejax.plan import candidates, pod, topology
from moejax.plan.compile import compile_step
from moejax.plan.predict import memory
from moejax.plan.predict.flops import executed_flops
from moejax.plan.predict.load import load_of
from moejax.plan.predict.weights import Shares, weights_of
from moejax.plan.search import Plan, mesh_text


def compare(config: Config, plan: Plan) -> dict[str, Any]:
  """Compiles a plan; returns predicted and compiled figures, per device and step.

  A GPU program compiled here has no kernels that need a GPU (`Load.has_kernels`), so it
  is compared with a prediction without them.

  Args:
    config: the config of the search.
    plan: a plan that the search found.
  """
  own = candidates.configured(config, plan.candidate)
  machine = plan.candidate.topology
  devices = topology.devices_of(machine)
  chip = topology.chip_of(machine, devices)
  has_kernels = chip.family != "gpu"
  load = load_of(own, plan.candidate.mesh, chip.family, has_kernels=has_kernels)
  shares = Shares(weights_of(own), plan.candidate.mesh, own.optimizer.name)
  result: dict[str, Any] = {
    "topology": str(machine),
    "mesh": {axis: getattr(own.mesh, axis) for axis in AXES},
    "name": f"{machine} as {mesh_text(plan.candidate)}",
    "predicted": {
      "memory": memory.predicted(own, load, shares).total,
      "flops": executed_flops(own, load)["total"],
      "wire": sum(row.bytes for row in plan.sent),
    },
    "hbm_bytes": plan.hbm_bytes,
    "has_kernels": has_kernels,
  }
  try:
    step = compile_step(own, devices)
  except jax.errors.JaxRuntimeError as error:
    # This may also be a compiler bug, which the next plan may not trigger.
    return result | {"refusal": str(error).strip().splitlines()[0]}
  found = pod.report(own, machine, step, chip)
  compiled = {
    "memory": found["memory_per_chip_bytes"]["total"],
    "flops": found["executed_flops_per_chip"],
    "wire": found["wire_bytes_per_chip"],
  }
  return result | {"compiled": compiled, "fits": found["fits"]}


def line(result: dict[str, Any]) -> str:
  """Returns one line with the predicted and the compiled figures, and the error."""
  if "refusal" in result:
    return f"{result['name']}: refused by the compiler: {result['refusal']}"
  predicted, compiled = result["predicted"], result["compiled"]

  def pair(name: str, unit: float, suffix: str) -> str:
    error = predicted[name] / compiled[name] - 1 if compiled[name] else 0.0
    return (
      f"{name} {predicted[name] / unit:,.1f}{suffix} predicted, "
      f"{compiled[name] / unit:,.1f} compiled ({error:+.1%})"
    )

  verdict = "fits" if result["fits"] else "does NOT fit"
  if not result["has_kernels"]:
    verdict += " without the kernels that a run on GPUs has"
  parts = (pair("memory", 1e9, " GB"), pair("flops", 1e12, "T"), pair("wire", 1e9, " GB"))
  return f"{result['name']}: {verdict}; {'; '.join(parts)}"
