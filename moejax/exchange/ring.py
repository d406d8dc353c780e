"""Every device of the expert axis gets all tokens of the axis, and runs its own experts.

An all-gather and a reduce-scatter, which run as rings. Carries any layout: each device
lays out its own experts' part of the placement. No buffer can overflow, and where P <= K
a token visits nearly every device anyway. Runs inside a `jax.shard_map`.

Letters: G groups of this device, T tokens of a group, D width, E experts, P devices of
the expert axis.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moejax import parts
from moejax.dispatch.base import Layout
from moejax.exchange.base import AXIS, SAVED_NAME, Options
from moejax.experts.weights import ExpertWeights
from moejax.routing.placement import Placement


def ring(
  x: Float[Array, "G T D"],
  placement: Placement,
  layout: type[Layout],
  weights: ExpertWeights,
  options: Options,
) -> tuple[Float[Array, "G T D"], None]:
  """Gathers all tokens of the axis, runs local experts, reduce-scatters the sums."""
  local = placement.num_experts // jax.lax.axis_size(AXIS)
  first = jax.lax.axis_index(AXIS) * local
  everyone = checkpoint_name(_gather(x), SAVED_NAME)
  mine = jax.vmap(lambda group: group.window(first, local))(_gather(placement))
  out = layout.of(mine).run(
    everyone, weights, activation=options.activation, chunks=options.expert_chunks
  )
  with parts.scope(parts.EXCHANGE):
    y = jax.lax.psum_scatter(out, AXIS, scatter_dimension=0, tiled=True)
  return checkpoint_name(y, SAVED_NAME), None


@parts.of_part(parts.EXCHANGE)
def _gather(groups: Any) -> Any:
  """Joins the leading axes of all devices."""
  return jax.tree.map(
    lambda array: jax.lax.all_gather(array, AXIS, axis=0, tiled=True), groups
  )
