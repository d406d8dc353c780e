"""An MoE layer in a model of your own, trained by a plain NNX loop.

  python -m examples.nnx_training

The model sorts points in the plane into four classes; its MoE layer has eight experts.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moejax import MoE, is_trained

CLASSES, WIDTH, STEPS = 4, 32, 60


class Model(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.inside = nnx.Linear(2, WIDTH, rngs=rngs)
    self.moe = MoE(
      width=WIDTH,
      num_experts=8,
      num_selected=2,
      hidden=64,
      router="sigmoid_bias",
      router_options={"bias_update_rate": 0.01},
      renormalize="before_drop",
      rngs=rngs,
    )
    self.outside = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

  def __call__(self, x):
    h = self.inside(x)
    y, aux = self.moe(h, train=True)
    return self.outside(h + y), aux


def batch(key):
  """Points and their quadrants: [B, S, 2] and [B, S]."""
  points = jax.random.normal(key, (8, 32, 2))
  signs = (points > 0).astype(jnp.int32)
  return points, signs[..., 0] + 2 * signs[..., 1]


@nnx.jit
def step(model, optimizer, points, classes):
  def loss_of(model):
    logits, aux = model(points)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()
    return loss + aux.loss, (loss, aux)

  # `is_trained` leaves out the balancing biases, which weight decay would ruin.
  wrt = nnx.DiffState(0, is_trained)
  gradients, (loss, aux) = nnx.grad(loss_of, argnums=wrt, has_aux=True)(model)
  optimizer.update(model, gradients)
  model.moe.update_router(aux.stats)
  return loss, aux.stats.load


def main() -> float:
  model = Model(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=is_trained)
  loss = jnp.inf
  for number, key in enumerate(jax.random.split(jax.random.key(1), STEPS)):
    loss, load = step(model, optimizer, *batch(key))
    if number % 20 == 0:
      print(f"step {number}: loss {loss:.3f}, tokens per expert {load.astype(int)}")
  print(f"after {STEPS} steps: loss {loss:.3f}")
  return float(loss)


if __name__ == "__main__":
  main()
