"""Whole MoE blocks of other codebases: router, experts and gradients together."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moejax.config import ModelConfig, MoEConfig
from moejax.dispatch.mix import Mix
from moejax.experts.weights import ExpertWeights
from moejax.layers.moe import MoE
from moejax.models.shell import Shell
from tests.golden.common import Golden, cotangent, mask, names, options_of, run, z

HF = {
  "hf_mixtral_block": ("top_k", {"renormalize": "before_drop"}),
  "hf_qwen3_moe_block": ("top_k", {"renormalize": "before_drop"}),
  "hf_olmoe_norm_block": ("top_k", {"renormalize": "before_drop"}),
  "hf_olmoe_block": ("top_k", {}),
  "hf_deepseek_v2_block": ("group_limited", {"group_best": 1}),
  "hf_deepseek_v3_block": (
    "sigmoid_bias",
    {"renormalize": "before_drop", "group_best": 2},
  ),
}


def shared_expert(g: Golden, x: jax.Array) -> jax.Array:
  """The expert that every token visits, in torch's (out, in) layout; 0 without one."""
  if "shared_gate_proj" not in g:
    return jnp.zeros_like(x)
  hidden = jax.nn.silu(x @ g["shared_gate_proj"].T) * (x @ g["shared_up_proj"].T)
  return hidden @ g["shared_down_proj"].T


@pytest.mark.parametrize(
  "name",
  [p for entry in HF for p in names(entry + ".")],
)
def test_hugging_face_block(name: str):
  """Output, choices, weights, and gradients of input, router and experts."""
  g = Golden(name)
  p = g.params
  router, changes = HF[name.split(".")[0]]
  if p.get("n_group"):
    groups = {"num_expert_groups": p["n_group"], "num_selected_groups": p["topk_group"]}
    changes = {**changes, **groups, "gate_scale": p["routed_scaling_factor"]}
  opts = options_of(g, **changes)
  extra = {"bias": jnp.asarray(g["bias"])} if "bias" in g else {}
  gate_up = jnp.swapaxes(jnp.asarray(g["gate_up_proj"]), 1, 2)
  width = gate_up.shape[-1] // 2

  def block(x, router_weight, down):
    x = x.reshape(1, -1, p["D"])
    routing = run(router, x @ router_weight.T, opts, **extra)
    weights = ExpertWeights(
      w_gate=gate_up[..., :width],
      w_in=gate_up[..., width:],
      w_out=jnp.swapaxes(down, 1, 2),
    )
    y = Mix.of(routing.placement).run(x, weights, activation="swiglu")
    return y + shared_expert(g, x), routing

  def loss(*args):
    y = block(*args)[0].reshape(g["y"].shape)
    return jnp.sum(y * cotangent(y.shape))

  args = tuple(jnp.asarray(g[a]) for a in ("x", "router_weight", "down_proj"))
  y, routing = block(*args)
  g.near("y", y, 1e-5)
  # Recorded in order of weight; a bias may have chosen in another one.
  order = jnp.argsort(-routing.assignments.gate.reshape(-1, p["K"]), axis=-1)
  expert = routing.assignments.expert.reshape(-1, p["K"])
  g.same("indices", jnp.take_along_axis(expert, order, -1))
  gate = routing.assignments.gate.reshape(-1, p["K"])
  g.near("weights", jnp.take_along_axis(gate, order, -1))
  d_x, d_router, d_down = jax.jit(jax.grad(loss, (0, 1, 2)))(*args)
  g.near("grad_x", d_x, 1e-5)
  g.near("grad_router_weight", d_router, 1e-5)
  g.near("grad_down_proj", d_down, 1e-5)


@pytest.mark.parametrize("name", names("hf_qwen2_moe_block"))
def test_qwen2_is_a_layer_of_ours_with_a_gate_on_its_shared_expert(name: str):
  """Not put together by hand: `MoE` under a config, with `shared_gate`, in output and
  in the gradients of input, router and experts."""
  g = Golden(name)
  p = g.params
  model = ModelConfig(
    num_layers=1, width=p["D"], num_heads=1, hidden=p["F"], activation="swiglu"
  )
  moe = MoEConfig(
    num_experts=p["E"],
    num_selected=p["K"],
    hidden=p["F"],
    router="top_k",
    shared_hidden=len(g["shared_gate_proj"]),
    shared_gate=True,
    capacity_factor=None,
  )
  shell = Shell(lambda key: MoE(model, moe, nnx.Rngs(params=key)))
  gate_up = jnp.swapaxes(jnp.asarray(g["gate_up_proj"]), 1, 2)
  transposed = {
    name: jnp.asarray(g[array]).T
    for name, array in (
      ("w_gate", "shared_gate_proj"),
      ("w_in", "shared_up_proj"),
      ("w_out", "shared_down_proj"),
    )
  }

  def loss(x, router, down):
    params = {
      "router": {"weight": router.T},
      "experts": {
        "w_gate": gate_up[..., : p["F"]],
        "w_in": gate_up[..., p["F"] :],
        "w_out": jnp.swapaxes(down, 1, 2),
      },
      "shared": transposed,
      "shared_gate": jnp.asarray(g["shared_expert_gate"]).T,
    }
    ones = jnp.ones(x.shape[:2], jnp.int32)
    y, _ = shell.merge(params)(
      x, ones > 0, ones, key=None, train=True, capacity_factor=None
    )
    return jnp.sum(y * cotangent(y.shape)), y

  args = tuple(jnp.asarray(g[a]) for a in ("x", "router_weight", "down_proj"))
  gradients, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*args)
  g.near("y", y, 1e-5)
  for key, grad in zip(
    ("grad_x", "grad_router_weight", "grad_down_proj"), gradients, strict=True
  ):
    g.near(key, grad, 1e-5)


def _layer(g: Golden, x, w, w_in, w_out):
  routing = run("top_k", x @ w, options_of(g))
  weights = ExpertWeights(w_in=w_in, w_out=w_out)
  return Mix.of(routing.placement).run(x, weights, activation="relu"), routing


@pytest.mark.parametrize("name", names("flaxformer_layer"))
def test_flaxformer_layer(name: str):
  """Both of its dispatchers; a token that every expert dropped gives exactly 0."""
  g = Golden(name)
  args = tuple(jnp.asarray(g[a]) for a in ("x", "w", "wi", "wo"))
  y, _ = _layer(g, *args)
  g.near("y", y, 1e-5)

  def loss(*args):
    y, _ = _layer(g, *args)
    return jnp.sum(y * cotangent(y.shape))

  grads = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*args)
  for key, grad in zip(("grad_x", "grad_w", "grad_wi", "grad_wo"), grads, strict=True):
    g.near(key, grad, 1e-5)


@pytest.mark.parametrize("name", names("hf_switch_block"))
def test_hugging_face_switch(name: str):
  """Capacity per sequence; dropped tokens are zero, not scaled."""
  g = Golden(name)
  x, router = jnp.asarray(g["x"]), jnp.asarray(g["router_weight"])
  w_in = jnp.swapaxes(jnp.asarray(g["wi"]), 1, 2)
  w_out = jnp.swapaxes(jnp.asarray(g["wo"]), 1, 2)

  def loss(x, router):
    y, _ = _layer(g, x, router.T, w_in, w_out)
    return jnp.sum(y * cotangent(y.shape))

  y, routing = _layer(g, x, router.T, w_in, w_out)
  g.near("y", y, 1e-5)
  g.same("dispatch", jnp.any(mask(routing), -1))
  g.near("z_loss", z(x @ router.T), 1e-5)
  d_x, d_router = jax.jit(jax.grad(loss, (0, 1)))(x, router)
  g.near("grad_x", d_x, 1e-5)
  g.near("grad_router_weight", d_router, 1e-5)
