"""Our routers against what the routers of PyTorch codebases put out, recorded.

Each test sets the source's conventions by options and compares masks and indices
exactly, values, losses and gradients within rounding. docs/conventions.md says which
option stands for which convention, and what is not offered.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import losses
from moejax.routing.assignment import sinkhorn
from tests.golden.common import (
  KEY,
  Golden,
  balance,
  check_gradients,
  combine,
  cotangent,
  give,
  mask,
  names,
  options_of,
  run,
  z,
)


@pytest.mark.parametrize("name", names("tutel_topk"))
def test_tutel(name: str):
  """Gates over their sum before drops; positions counted beyond the capacity."""
  g = Golden(name)
  k = g.params["K"]
  priority = "gate" if g.params["batch_prioritized_routing"] else "arrival"
  opts = options_of(
    g,
    capacity=None,
    priority=priority,
    renormalize="before_drop" if k > 1 and g.params["normalize_gate"] else "none",
  )
  logits = jnp.log(jnp.asarray(g["scores"]))[None]
  routing = run("top_k", logits, opts)
  g.same("indices", routing.assignments.expert)
  g.same("locations", routing.assignments.slot)
  g.near("gates", routing.assignments.gate)
  g.near("aux_loss", balance(routing, first=True), 1e-5)
  capped = run("top_k", logits, options_of(g, priority=priority))
  np.testing.assert_array_equal(
    capped.assignments.kept, routing.assignments.slot < g.params["C"]
  )


@pytest.mark.parametrize("name", names("tutel_load_importance"))
def test_tutel_losses(name: str):
  """Unbiased variances; the load term, as the paper has it, takes clean logits."""
  g = Golden(name)
  scale = g.params["noise_std"] / g.params["E"]
  logits = jnp.asarray(g["logits"])
  noisy = logits + scale * g["noise"]
  valid = jnp.ones(logits.shape[0], bool)
  wide = jnp.full(logits.shape, scale)
  for clean, output in (
    (logits, "loss_from_logits"),
    (jax.nn.softmax(logits), "loss_from_probs"),
  ):
    chance = losses.load_probability(clean, noisy, wide, g.params["K"], excluding=False)
    load = losses.load_loss(chance, valid, ddof=1)
    both = 0.5 * (losses.importance_loss(clean, valid, ddof=1) + load)
    g.near(output, both, 1e-5)


DEEPSPEED = {
  "deepspeed_top1_nodrop": ({"capacity": None}, True),
  "deepspeed_top1_rts": ({"priority": "random", "slot_numbering": "arrival"}, True),
  "deepspeed_top2": ({"renormalize": "after_drop"}, True),
  "deepspeed_topk_position": (
    {"renormalize": "after_drop", "slot_order": "token_major"},
    False,
  ),
  "deepspeed_topk_probs": (
    {"renormalize": "after_drop", "slot_order": "by_gate", "slot_numbering": "arrival"},
    False,
  ),
}


@pytest.mark.parametrize("name", names("deepspeed_"))
def test_deepspeed(name: str, monkeypatch):
  """Gates over the survivors' sum; token-major, by probability, or random selection."""
  g = Golden(name)
  changes, first = DEEPSPEED[name.split(".")[0]]
  opts = options_of(g, **changes)
  if "uniform" in g:
    best = np.argmax(g["logits"], -1)
    draws = np.take_along_axis(g["uniform"], best[:, None], -1)[:, 0]
    give(monkeypatch, "permutation", [np.argsort(-draws).astype(np.int32)])

  def route(logits):
    return run("top_k", logits, opts, key=KEY if "uniform" in g else None)

  routing = route(g.groups("logits", 3))
  g.same("dispatch_mask", mask(routing)[..., : g.params["C"]])
  g.near("combine", combine(routing)[..., : g.params["C"]])
  g.near("aux_loss", balance(routing, first=first), 1e-5)
  if "top2" not in name:
    g.same("exp_counts", routing.stats.chosen)
  check_gradients(g, route, first)


MEGATRON = {
  "megatron_post_softmax": ("top_k", {"renormalize": "before_drop"}),
  "megatron_pre_softmax": ("top_k", {}),
  "megatron_softmax_groups": ("group_limited", {}),
  "megatron_sigmoid_bias": ("sigmoid_bias", {"renormalize": "before_drop"}),
  "megatron_sigmoid_bias_groups": ("sigmoid_bias", {"renormalize": "before_drop"}),
}


@pytest.mark.parametrize("name", names("megatron_p", "megatron_s", leave_out="sinkhorn"))
def test_megatron(name: str):
  """Experts keep their largest weights; the balance loss ignores bias and groups."""
  g = Golden(name)
  router, changes = MEGATRON[name.split(".")[0]]
  groups, selected = g.params["num_groups"] or 1, g.params["group_topk"] or 1
  opts = options_of(
    g,
    slot_order="by_gate",
    gate_scale=g.params["scaling_factor"] or 1.0,
    num_expert_groups=groups,
    num_selected_groups=selected,
    group_best=g.params["K"] // selected,
    **changes,
  )
  extra = {"bias": jnp.asarray(g["bias"])} if "bias" in g else {}
  logits = g.groups("logits", 3)

  def weights(logits, opts=opts):
    return jnp.sum(combine(run(router, logits, opts, **extra)), -1)

  dropless = opts | {"capacity": None}
  g.near("probs", weights(logits, dropless))
  g.same("routing_map", weights(logits, dropless) > 0)
  g.near("dropped_probs", weights(logits))
  g.same("dropped_map", weights(logits) > 0)
  plain = options_of(g, capacity=None)
  plain_router = "sigmoid_bias" if "sigmoid" in name else "top_k"

  def aux(logits):
    return balance(run(plain_router, logits, plain))

  def loss(logits):
    out = weights(logits)
    return jnp.sum(out * cotangent(out.shape))

  g.near("aux_loss", aux(logits), 1e-5)
  g.near("z_loss", z(logits), 1e-5)
  g.near("grad_logits_aux", jax.jit(jax.grad(aux))(logits), 1e-5)
  g.near("grad_logits_z", jax.jit(jax.grad(z))(logits), 1e-5)
  g.near("grad_logits_probs", jax.jit(jax.grad(loss))(logits), 1e-5)


@pytest.mark.parametrize("name", names("megatron_sinkhorn"))
def test_megatron_sinkhorn(name: str):
  """The same transport plan."""
  g = Golden(name)
  cost = jnp.asarray(g["cost"])
  plan = sinkhorn(cost, jnp.ones(len(cost), bool), tolerance=1e-4, max_iterations=1000)
  g.near("plan", plan, 1e-5)


@pytest.mark.parametrize("name", names("megablocks"))
def test_megablocks(name: str):
  """Gates raw, over their sum, or over their L2 norm; losses per layer."""
  g = Golden(name)
  norm = g.params["moe_normalize_expert_weights"]
  opts = options_of(
    g, renormalize="before_drop" if norm else "none", renormalize_norm=norm or 1.0
  )
  logits = jnp.einsum("ltd,led->lte", g["x"], g["router_weight"])
  routing = run("top_k", logits, opts)
  g.near("scores", routing.probs)
  g.same("indices", routing.assignments.expert)
  g.near("aux_loss", balance(routing), 1e-5)
  g.near("z_loss", [z(one[None]) for one in logits], 1e-5)
  g.near("weights", routing.assignments.gate)


@pytest.mark.parametrize("name", names("hf_balance_loss"))
def test_hf_balance_loss(name: str):
  """All layers as one group, times K; padding left out."""
  g = Golden(name)
  p = g.params
  logits = jnp.asarray(g["logits"])
  valid = jnp.ones(logits.shape[1], bool)
  key = next((k for k in ("mask", "attention_mask") if k in g), None)
  if key:
    valid = jnp.asarray(g[key]).reshape(-1) > 0

  def pooled(logits):
    layers = logits.shape[0]
    flat, real = logits.reshape(1, -1, p["E"]), jnp.tile(valid, layers)[None]
    return p["K"] * balance(run("top_k", flat, options_of(g), real), real)

  g.near("loss", pooled(logits), 1e-5)
  g.near("grad_logits", jax.jit(jax.grad(pooled))(logits), 1e-5)
  if "loss_of_each_layer" in g:
    g.near("loss_of_each_layer", [pooled(one[None]) for one in logits], 1e-5)
