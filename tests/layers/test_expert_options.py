"""Activations of the experts and biases on experts and router, against the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import MeshConfig, ModelConfig, MoEConfig
from moejax.experts.weights import activate
from moejax.layers.moe import MoE
from moejax.models.shell import Shell
from moejax.routing.base import SlotPolicy
from moejax.sharding import rules
from moejax.sharding.mesh import make_mesh
from tests import reference

B, S, D, E = 2, 12, 8, 4
MODEL = ModelConfig(num_layers=2, width=D, num_heads=2, hidden=16)
PLAIN = MoEConfig(
  num_experts=E,
  num_selected=2,
  hidden=6,
  router="top_k",
  capacity_factor=None,
  expert_bias=True,
  router_bias=True,
)


class Noisy(Shell):
  """A layer with no parameter at rest: biases start at zero, and would show nothing."""

  def init(self, key):
    leaves, tree = jax.tree.flatten(super().init(key))
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    noise = (0.7 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves))
    return jax.tree.unflatten(tree, [a + n for a, n in zip(leaves, noise)])


def make(**changes) -> Shell:
  moe = dataclasses.replace(PLAIN, **changes)
  return Noisy(lambda key: MoE(MODEL, moe, nnx.Rngs(params=key)))


def inputs(batch: int = B):
  x = jax.random.normal(jax.random.key(0), (batch, S, D), jnp.float32) * 2
  valid = jnp.arange(S)[None, :] < jnp.array([S, S - 3] * (batch // 2))[:, None]
  return x, valid, jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)


def value_and_gradients(shell, params, x, valid, cotangent):
  """The layer's output and the gradients of parameters and input."""

  def call(params, x):
    ids = jnp.zeros(valid.shape, jnp.int32)
    layer = shell.merge(params)
    return layer(x, valid, ids, key=None, train=True, capacity_factor=None)[0]

  y, vjp = jax.vjp(call, params, x)
  return y, *vjp(cotangent)


@pytest.mark.parametrize("dispatcher", ["einsum", "gather", "grouped"])
@pytest.mark.parametrize("activation", ["gelu", "geglu", "clamped_swiglu"])
def test_biases_and_activations_equal_the_oracle(activation, dispatcher):
  """Output and gradients of input, router, its bias, matrices and their biases."""
  shell = make(activation=activation, dispatcher=dispatcher)
  params = shell.init(jax.random.key(1))
  x, valid, cotangent = inputs()
  run = jax.jit(lambda params, x: value_and_gradients(shell, params, x, valid, cotangent))
  y, d_params, d_x = run(params, x)
  options = SlotPolicy(num_experts=E, num_selected=2, capacity=None)
  weights = {k: np.asarray(v, np.float64) for k, v in params["experts"].items()}
  assert ("gate_bias" in weights) == (activation != "gelu")
  # The router's bias is one more input that is always 1.
  bias = np.asarray(params["router"]["logit_bias"], np.float64)
  router = np.concatenate([np.asarray(params["router"]["weight"]), bias[None]])
  total = {k: np.zeros(v.shape) for k, v in {**weights, "router": router}.items()}
  for group in range(B):
    expected, gradients = with_constant_input(
      x[group], valid[group], router, weights, options, activation, cotangent[group]
    )
    np.testing.assert_allclose(y[group], expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(d_x[group], gradients["x"], atol=2e-4, rtol=1e-3)
    for key in total:
      total[key] += gradients[key]
  for key in weights:
    np.testing.assert_allclose(
      d_params["experts"][key], total[key], atol=2e-4, rtol=1e-3, err_msg=key
    )
  found = d_params["router"]
  np.testing.assert_allclose(found["weight"], total["router"][:-1], atol=2e-4, rtol=1e-3)
  np.testing.assert_allclose(
    found["logit_bias"], total["router"][-1], atol=2e-4, rtol=1e-3
  )


def with_constant_input(x, valid, router, weights, options, activation, cotangent):
  """The oracle's layer, whose router sees x and a 1; experts do not see the 1."""
  x = np.asarray(x, np.float64)
  wide = np.concatenate([x, np.ones((len(x), 1))], axis=1)
  routing = reference.route("top_k", wide @ router, np.asarray(valid), options)
  to = reference.assigned(routing)
  y = reference.experts_forward(x, to, weights, activation)
  d_y = np.asarray(cotangent, np.float64)
  d_x, d_gate, d_w = reference.experts_backward(x, to, weights, activation, d_y)
  d_logits = routing.backward(d_gate.reshape(routing.gate.shape))
  d_x += d_logits @ router[:-1].T
  return y, {"x": d_x, "router": wide.T @ d_logits, **d_w}


@pytest.mark.parametrize(
  ("exchange", "dispatcher", "chunks"),
  [
    ("all_to_all", "gather", 1),
    ("ragged", "grouped", 3),
    ("ring", "grouped", 1),
    ("gspmd", "auto", 1),
  ],
)
def test_on_a_mesh_each_bias_counts_once(exchange, dispatcher, chunks):
  """Experts, width and hidden width sharded: the same output and gradients."""
  factor = 4.0 if exchange == "all_to_all" else None
  shell = make(
    activation="clamped_swiglu",
    exchange=exchange,
    dispatcher=dispatcher,
    expert_chunks=chunks,
    capacity_factor=factor,
  )
  x, valid, cotangent = inputs(8)

  def call(params, x, valid, cotangent):
    def total(params, x):
      ids = jnp.zeros(valid.shape, jnp.int32)
      y, _ = shell.merge(params)(
        x, valid, ids, key=None, train=True, capacity_factor=factor
      )
      return jnp.sum(y * cotangent), y

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)

  params = shell.init(jax.random.key(1))
  (_, y), grads = jax.jit(call)(params, x, valid, cotangent)
  mesh = make_mesh(MeshConfig(data=1, expert=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(shell.init, jax.random.key(0))
    placed = rules.shardings(mesh, shell.axes, shapes)
    tokens = rules.batch_sharding(mesh)
    there = jax.device_put(params, placed)
    (_, y2), grads2 = jax.jit(call)(there, *jax.device_put((x, valid, cotangent), tokens))
  np.testing.assert_allclose(y2, y, atol=1e-4, rtol=1e-4)
  for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(grads2), strict=True):
    scale = float(jnp.abs(one).max())
    np.testing.assert_allclose(other, one, atol=1e-4 * scale, rtol=1e-3)


def test_the_clamp_of_gpt_oss_by_hand():
  """Gate above 7 counts as 7, |hidden| at most 7, and 1 is added to hidden."""
  gate = jnp.array([[0.0, 1.0, 100.0, -100.0]])
  hidden = jnp.array([[5.0, -100.0, 100.0, 1.0]])
  found = activate(hidden, gate, "clamped_swiglu")[0]
  wanted = [0.0, 1 / (1 + np.exp(-1.702)) * -6, 7 / (1 + np.exp(-1.702 * 7)) * 8, 0.0]
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-30)
