"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467): division by the root mean square."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.layers import parameter


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last axis, in float32, returned in x's dtype."""

  def __init__(self, size: int, *, epsilon: float, axis: str | None = "norm"):
    self.scale = parameter.constant(1.0, (size,), (axis,))
    self.epsilon = epsilon

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    scale = self.scale[...].astype(jnp.float32)
    scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)
