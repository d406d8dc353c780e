"""The dense feed-forward layer, also the shared experts of an MoE layer."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.config import ModelConfig
from moejax.config.ranges import GATED
from moejax.experts.weights import activate
from moejax.layers import parameter


class FeedForward(nnx.Module):
  """activation(x w_in) w_out, or swiglu(x w_gate, x w_in) w_out; no biases."""

  def __init__(
    self, config: ModelConfig, hidden: int, rngs: nnx.Rngs, activation: str = ""
  ):
    """Creates a layer.

    Args:
      config: of the model.
      hidden: hidden width.
      rngs: for the initial parameters.
      activation: empty means the model's.
    """
    width, scale, dtype = config.width, config.init_scale, config.param_dtype
    axes_in, axes_out = ("width", "hidden"), ("hidden", "width")
    out_scale = scale / (2 * config.num_layers) ** 0.5

    def w_in() -> nnx.Param:
      return parameter.matrix(
        rngs, (width, hidden), axes_in, fan_in=width, scale=scale, dtype=dtype
      )

    self.activation = activation or config.activation
    self.w_in = w_in()
    if self.activation in GATED:
      self.w_gate = w_in()
    self.w_out = parameter.matrix(
      rngs, (hidden, width), axes_out, fan_in=hidden, scale=out_scale, dtype=dtype
    )

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    hidden = jnp.einsum("...d,df->...f", x, self.w_in[...].astype(x.dtype))
    gate = None
    if self.activation in GATED:
      gate = jnp.einsum("...d,df->...f", x, self.w_gate[...].astype(x.dtype))
    hidden = activate(hidden, gate, self.activation)
    return jnp.einsum("...f,fd->...d", hidden, self.w_out[...].astype(x.dtype))
