"""The same layer on eight devices: experts over one axis, tokens over all.

  JAX_NUM_CPU_DEVICES=8 python -m examples.sharded_layer

Eight fake CPU devices are enough if there are no eight real ones.
"""

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import MoE
from moejax.config import MeshConfig
from moejax.sharding.mesh import make_mesh
from moejax.sharding.rules import RULES, batch_sharding


def main() -> float:
  layer = MoE(
    width=32,
    num_experts=8,
    num_selected=2,
    hidden=64,
    capacity_factor=1.25,
    rngs=nnx.Rngs(0),
  )
  graph, state = nnx.split(layer)
  x = jax.random.normal(jax.random.key(0), (16, 32, 32))

  def run(state, x):
    y, aux = nnx.merge(graph, state)(x, train=True)
    return y, aux.loss

  alone, _ = jax.jit(run)(state, x)

  # Two devices share the batch, four hold two experts each.
  mesh = make_mesh(MeshConfig(data=2, expert=4), jax.devices()[:8])
  with jax.set_mesh(mesh):
    # Each parameter says what its dimensions are; the rules say which axis cuts them.
    placed = jax.tree.map(
      lambda p: p.replace(
        jax.device_put(
          p[...], jax.sharding.NamedSharding(mesh, RULES.spec(p.logical_axes))
        )
      ),
      state,
      is_leaf=lambda p: isinstance(p, nnx.Variable),
    )
    text = jax.jit(run).lower(placed, x).compile().as_text() or ""
    spread, _ = jax.jit(run)(placed, jax.device_put(x, batch_sharding(mesh)))
  print(f"{text.count(' all-to-all(')} all-to-alls; the experts' first matrix:")
  print(placed.layer.experts.w_in[...].sharding)
  error = float(jnp.max(jnp.abs(np.asarray(spread) - np.asarray(alone))))
  print(f"largest difference from one device: {error:.1e}")
  return error


if __name__ == "__main__":
  main()
