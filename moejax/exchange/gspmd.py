"""No explicit exchange: sharding constraints on the slots, from which XLA derives it.

The readable reference for the explicit exchanges: with tokens sharded over groups and
experts over a mesh axis, the compiler turns the two einsums of dense weights into two
all-to-alls. It is also the fallback where groups cannot be divided over the devices.

Letters: G groups of all devices, T tokens of a group, D width, E experts, C slots per
expert and group.
Source: GShard, arXiv:2006.16668, section 3.2.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from moejax.dispatch.mix import Mix
from moejax.exchange.base import AXIS
from moejax.experts.weights import ExpertWeights, apply_experts
from moejax.routing.placement import Placement
from moejax.sharding.mesh import mesh_in_scope


def gspmd(
  x: Float[Array, "G T D"],
  placement: Placement,
  weights: ExpertWeights,
  activation: str,
) -> Float[Array, "G T D"]:
  """Runs the experts on slots sharded like the experts; outside a `shard_map`."""

  def at(array: Array, *axes: Any) -> Array:
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*axes))

  mix, mesh = Mix.of(placement), mesh_in_scope()
  assert mesh is not None
  divided = x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
  slots = (AXIS, ("data", "fsdp") if divided else None, None, None)
  rows = at(mix.to_experts(x), *slots)
  return mix.from_experts(at(apply_experts(rows, weights, activation), *slots))
