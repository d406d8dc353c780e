"""Muon for hidden matrices, Adam for everything else.

Muon steps along the orthogonal matrix nearest to the momentum of the gradient, found by a
few Newton-Schulz iterations. Every expert of every layer is a separate matrix: the axes
that stack layers and experts are batch axes. A projection to heads [D, H, head_dim] is
one matrix [D, H*head_dim], one from heads [H*head_dim, D]; query, key and value are
three.

On a mesh, the experts stay where they are, and each matrix is gathered over the other
axes once: the iterations multiply it with itself 15 times, and would send as much in each
product. The price is that devices that share a matrix repeat the same computation.

Sources: Jordan et al. 2024, kellerjordan.github.io/posts/muon (the iteration, Nesterov
momentum, which parameters are left to Adam, query, key and value apart); Moonlight,
arXiv:2502.16982, section 2.2 (the scale with which Muon and Adam share learning rate and
weight decay).
"""

from typing import Any

import jax
import optax
from jaxtyping import Array, Float
from optax.contrib import scale_by_muon

from moejax.config import OptimizerConfig
from moejax.sharding.mesh import NEWTON_SCHULZ, mesh_in_scope, shard_map
from moejax.sharding.rules import RULES, STACKED, LogicalAxes, is_axes
from moejax.types import Params

_OUTER = ("width", "rank")
_INNER = ("hidden", "heads", "kv_heads", "head_dim")


def muon(config: OptimizerConfig, axes: Params) -> optax.GradientTransformation:
  """Returns the transformation, without learning rate and weight decay.

  Args:
    config: moments, iterations and scale.
    axes: logical axes of the trained parameters.
  """
  labels = jax.tree.map(is_matrix, axes, is_leaf=is_axes)
  names = jax.tree.map(
    lambda n: n if is_matrix(n) else optax.MaskedNode(), axes, is_leaf=is_axes
  )
  steps, rms = config.newton_schulz_steps, config.update_rms

  def orthogonal(momentum: Any, params: Any) -> Any:
    del params
    return jax.tree.map(
      lambda m, n: orthogonalize(m, n, steps=steps, rms=rms), momentum, names
    )

  momentum = optax.trace(config.momentum, nesterov=True)
  return optax.partition(
    {
      True: optax.chain(momentum, optax.stateless(orthogonal)),
      False: optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
    },
    labels,
  )


def is_matrix(names: LogicalAxes) -> bool:
  """Returns whether a parameter holds hidden matrices.

  They map the width, or a latent vector, to an inner dimension of a layer or back, or
  the width to a latent vector. Embeddings, the output head, routers, gates, norms and
  biases do not.

  Args:
    names: logical axes of the parameter.
  """
  own = [n for n in names if n not in STACKED]
  inner = [n for n in own if n in _INNER]
  if own == ["width", "latent"]:
    return True
  sides = ([[outer, *inner], [*inner, outer]] for outer in _OUTER)
  return bool(inner) and any(own in pair for pair in sides)


def orthogonalize(
  momentum: Float[Array, "..."], names: LogicalAxes, *, steps: int, rms: float
) -> Float[Array, "..."]:
  """Replaces every matrix of a parameter by the nearest orthogonal one, scaled.

  Args:
    momentum: like the parameter, and sharded like it on the mesh in scope.
    names: logical axes of the parameter, for which `is_matrix` holds.
    steps: Newton-Schulz iterations.
    rms: root mean square of the entries of each result, if its singular values are 1.
  """
  spec = RULES.spec(names)
  shared = {i: axis for i, axis in enumerate(spec) if axis and names[i] not in STACKED}

  def function(part: Float[Array, "..."]) -> Float[Array, "..."]:
    whole = part
    for i, axis in shared.items():
      whole = jax.lax.all_gather(whole, axis, axis=i, tiled=True)
    whole = _orthogonal(whole, names, steps) * rms
    for i, axis in shared.items():
      start = jax.lax.axis_index(axis) * part.shape[i]
      whole = jax.lax.dynamic_slice_in_dim(whole, start, part.shape[i], i)
    return whole

  if mesh_in_scope() is None:
    shared = {}
    return function(momentum)
  with jax.named_scope(NEWTON_SCHULZ):
    return shard_map(function, in_specs=spec, out_specs=spec)(momentum)


def _orthogonal(
  momentum: Float[Array, "..."], names: LogicalAxes, steps: int
) -> Float[Array, "..."]:
  """Returns orthogonal matrices with entries of root mean square 1."""
  num_stacked = sum(n in STACKED for n in names)
  own = momentum.shape[num_stacked:]
  rows, columns = (own[0], -1) if names[num_stacked] in _OUTER else (-1, own[-1])
  matrices = momentum.reshape(*momentum.shape[:num_stacked], rows, columns)
  # Without a momentum of its own, optax's Muon is the iteration alone. Its own batching
  # merges all stacked axes into one, for which the compiler would gather the experts.
  iteration = scale_by_muon(beta=0.0, nesterov=False, ns_steps=steps)

  def orthogonal(matrix: Any) -> Any:
    return iteration.update(matrix, iteration.init(matrix))[0]

  for _ in range(num_stacked):
    orthogonal = jax.vmap(orthogonal)
  # An orthogonal m x n matrix has min(m, n) singular values of 1, so its entries have a
  # root mean square of 1 / sqrt(max(m, n)).
  scale = max(matrices.shape[-2:]) ** 0.5
  return scale * orthogonal(matrices).reshape(momentum.shape)
