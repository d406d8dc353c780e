"""The health of routers in a model of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize(("router", "span"), [("sigmoid_bias", 3.5), ("top_k", 0.0)])
def test_a_selection_bias_is_measured_where_the_router_declares_one(router, span):
  """Largest less smallest; another router's parameter of that name means nothing."""
  model = make_model(
    ModelConfig(num_layers=1, width=8, num_heads=1, hidden=8),
    MoEConfig(router=router, num_experts=4, hidden=8, every=1, offset=0),
    vocab_size=8,
  )
  params = model.init(jax.random.key(0))
  for part in ("prefix", "unit", "suffix"):
    for block in params.get(part, {}).values():
      bias = jnp.array([-1.0, 0.0, 2.5, 1.0])
      shape = (*block["moe"]["router"]["weight"].shape[:-2], 4)
      block["moe"]["router"]["bias"] = jnp.broadcast_to(bias, shape)
  health = router_health(model, params, params, jnp.float32(1.0))
  np.testing.assert_array_equal(health.bias_span, [span])
