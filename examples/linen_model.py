"""The same layer in a Linen model, through Flax's bridge.

  python -m examples.linen_model

Routers with a bias that no gradient moves (sigmoid_bias, quantile_bias,
quantile_balancing) are for NNX models: after each step their rule must be applied with
`update_router`, which a Linen model cannot call.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from moejax import MoE

WIDTH = 32


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    h = nn.LayerNorm()(x)
    moe = nnx.bridge.to_linen(
      MoE, width=WIDTH, num_experts=4, num_selected=2, hidden=64, name="moe"
    )
    y, aux = moe(h)
    return x + y, aux.loss


def main() -> float:
  x = jax.random.normal(jax.random.key(0), (2, 16, WIDTH))
  model = Block()
  variables = model.init(jax.random.key(1), x)

  def loss_of(params):
    y, loss = cast(Any, model.apply({**variables, "params": params}, x))
    return jnp.mean(jnp.square(y)) + loss

  loss, gradients = jax.jit(jax.value_and_grad(loss_of))(variables["params"])
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    print(f"{jax.tree_util.keystr(path):60} {leaf.shape}")
  print(f"loss {loss:.4f}")
  return float(loss)


if __name__ == "__main__":
  main()
