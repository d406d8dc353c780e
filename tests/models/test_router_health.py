"""The health of routers in a model of any size."""

import jax
import jax.numpy as jnp

from moejax.config import ModelConfig, MoEConfig
from moejax.models.make import make_model
from moejax.models.router_health import router_health


def test_more_parameters_than_int32_counts():
  """A step of a model of billions of parameters can be traced: their number is never an
  int32."""
  model = make_model(
    ModelConfig(num_layers=1, width=8, num_heads=1, hidden=8),
    MoEConfig(num_experts=2, hidden=8, every=1, offset=0),
    vocab_size=8,
  )
  params = model.shapes()
  large = jax.ShapeDtypeStruct((1 << 16, 1 << 16), jnp.float32)
  norm = jax.ShapeDtypeStruct((), jnp.float32)
  health = jax.eval_shape(
    lambda params, gradients, norm: router_health(model, params, gradients, norm),
    *(params, params | {"large": large}, norm),
  )
  assert health.other_gradient.dtype == jnp.float32
