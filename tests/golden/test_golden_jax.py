"""Our routers against what the routers of JAX codebases put out, recorded.

Each test sets the source's conventions by options and compares masks and indices
exactly, values, losses and gradients within rounding. docs/conventions.md says which
option stands for which convention, and what is not offered.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import losses
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


@pytest.mark.parametrize("name", names("flaxformer_tokens"))
def test_flaxformer_tokens_choose(name: str):
  """Raw gates, choice-major or batch priority; balance loss is K times ours."""
  g = Golden(name)
  p = g.params
  priority = "gate" if p["batch_prioritized_routing"] else "arrival"
  opts = options_of(g, priority=priority)
  real = jnp.asarray(g["valid"] > 0) if "valid" in g else jnp.ones((p["G"], p["T"]), bool)
  # The scatter router routes padding like any token, and only zeroes its weight.
  scatter = "scatter" in name
  valid = jnp.ones_like(real) if scatter else real
  x, w = jnp.asarray(g["x"]), jnp.asarray(g["w"])

  def route(x, w):
    return run("top_k", x @ w, opts, valid)

  def weights(x, w):
    routing = route(x, w)
    if not scatter:
      return combine(routing)
    gate = routing.assignments.gate.reshape(p["G"], p["T"], p["K"])
    return jnp.where(real[:, :, None], gate, 0.0)

  def loss(x, w):
    out = weights(x, w)
    return jnp.sum(out * cotangent(out.shape))

  routing = route(x, w)
  g.near("combine", weights(x, w))
  if scatter:
    everything = run(
      "top_k", x @ w, options_of(g, priority=priority, capacity=None), valid
    )
    shape = (p["G"], p["T"], p["K"])
    g.same(
      "dispatch_indices",
      jnp.stack(
        [
          everything.assignments.expert.reshape(shape),
          everything.assignments.slot.reshape(shape),
        ],
        -1,
      ),
    )
  else:
    g.same("dispatch_mask", mask(routing))
  d_x, d_w = jax.jit(jax.grad(loss, (0, 1)))(x, w)
  # Padding's input is masked before the router there; its gradient is none.
  g.near("grad_x_combine", jnp.where(real[:, :, None], d_x, 0.0), 1e-5)
  g.near("grad_w_combine", d_w, 1e-5)
  g.near("z_loss", z(x @ w), 1e-5)
  g.near("grad_w_z", jax.grad(lambda w: z(x @ w))(w), 1e-5)
  # Means are over T with padding in it, where ours are over valid tokens: of counts
  # and probabilities, or of probabilities alone where padding is counted as routed.
  share = jnp.mean(real, axis=-1) ** (1 if scatter else 2)

  def aux(w):
    routing = run("top_k", x @ w, opts, valid)
    each = jax.vmap(losses.balance_loss)(routing.probs, routing.stats.chosen, real)
    return p["K"] * jnp.mean(each * share)

  g.near("aux_loss", aux(w), 1e-5)
  g.near("grad_w_aux", jax.jit(jax.grad(aux))(w), 1e-5)


@pytest.mark.parametrize("name", names("flaxformer_experts", "vmoe_top_items"))
def test_expert_choice(name: str):
  """Slot c holds the c-th best token."""
  g = Golden(name)
  if "gates" in g:
    routing = run("expert_choice", jnp.log(jnp.asarray(g["gates"]))[None], options_of(g))
    g.same("dispatch_mask", mask(routing))
    g.near("combine", combine(routing))
    return
  x, w = jnp.asarray(g["x"]), jnp.asarray(g["w"])
  valid = jnp.asarray(g["valid"] > 0) if "valid" in g else None

  def loss(x, w):
    out = combine(run("expert_choice", x @ w, options_of(g), valid))
    return jnp.sum(out * cotangent(out.shape))

  routing = run("expert_choice", x @ w, options_of(g), valid)
  g.same("dispatch_mask", mask(routing))
  g.near("combine", combine(routing))
  d_x, d_w = jax.jit(jax.grad(loss, (0, 1)))(x, w)
  g.near("grad_x_combine", d_x, 1e-5)
  g.near("grad_w_combine", d_w, 1e-5)
  g.near("z_loss", z(x @ w), 1e-5)


@pytest.mark.parametrize("name", names("praxis_expert_choice"))
def test_praxis_expert_choice(name: str):
  """The same tokens and weights; the order within an expert has no effect."""
  g = Golden(name)
  valid = jnp.asarray(g["padding"] == 0) if "padding" in g else None
  got = combine(run("expert_choice", jnp.asarray(g["logits"]), options_of(g), valid))
  if "perm" in g:
    want = np.einsum("gec,gect->gte", g["gate"], g["perm"])
  else:
    want = g["combine"].sum(-1)
  np.testing.assert_allclose(got.sum(-1), want, rtol=2e-6)


@pytest.mark.parametrize("name", names("vmoe_top_experts"))
def test_vmoe_dispatch(name: str):
  """Masks, indices with their would-be positions, dispatched and combined data."""
  g = Golden(name)
  priority = "gate" if g.params["batch_priority"] else "arrival"
  logits = jnp.log(jnp.asarray(g["gates"]))[None]
  routing = run("top_k", logits, options_of(g, priority=priority))
  g.same("dispatch_mask", mask(routing))
  g.near("combine", combine(routing))
  everything = run("top_k", logits, options_of(g, priority=priority, capacity=None))
  g.same(
    "indices",
    jnp.stack([everything.assignments.expert[0], everything.assignments.slot[0]], -1),
  )
  g.near("index_weights", everything.assignments.gate)
  sent = jnp.einsum("tec,td->ecd", mask(routing)[0].astype(jnp.float32), g["data"])
  g.near("dispatched_einsum", sent)
  back = jnp.einsum("tec,ecd->td", combine(routing)[0], g["expert_out"])
  g.near("combined_indices", back)


@pytest.mark.parametrize("name", names("vmoe_router"))
def test_vmoe_router(name: str, monkeypatch):
  """Noise 1/E, clean importance, K-th largest as the load's threshold."""
  g = Golden(name)
  noisy = "noise" in g
  x, w = jnp.asarray(g["x"]), jnp.asarray(g["w"])
  opts = options_of(g, noise="fixed", noise_std=g.params["noise_std"])

  def route(w):
    if noisy:
      give(monkeypatch, "normal", g["noise"])
    return run("noisy_top_k", x @ w, opts, key=KEY if noisy else None)

  def terms(w):
    routing = route(w)
    valid = jnp.ones(x.shape[:2], bool)
    counts = jax.vmap(losses.first_choices)(routing, valid)
    gshard = jax.vmap(losses.balance_loss)(routing.probs, counts, valid)
    assert routing.losses is not None
    return gshard, routing.losses["importance_loss"], routing.losses["load_loss"]

  routing = route(w)
  g.same("dispatch_mask", mask(routing))
  g.near("combine", combine(routing))
  gshard, importance, load = terms(w)
  g.near("gshard_loss", gshard, 1e-5)
  g.near("importance_loss", importance, 1e-5)
  if noisy:
    g.near("load_loss", load, 1e-5)
  weight = (
    g.params["gshard_loss_weight"],
    g.params["importance_loss_weight"],
    g.params["load_loss_weight"],
  )

  def total(w):
    return sum(a * jnp.sum(b) for a, b in zip(weight, terms(w), strict=True))

  g.near("grad_w_aux", jax.jit(jax.grad(total))(w), 1e-5)


@pytest.mark.parametrize("name", names("praxis_top"))
def test_praxis(name: str, monkeypatch):
  """Legacy renormalises before drops, otherwise after; only first choices counted."""
  g = Golden(name)
  policy = g.params.get("second_expert_policy", "all")
  legacy = g.params.get("legacy_mtf_behavior", True)
  policies = {"sampling": "sample", "random": "random" if legacy else "random_raw"}
  renormalize = "before_drop" if legacy else "after_drop"
  opts = options_of(
    g,
    renormalize="none" if g.params["K"] == 1 else renormalize,
    second_policy=policies.get(policy, policy),
  )
  valid = jnp.asarray(g["padding"] == 0) if "padding" in g else None
  router = "top2" if "top2" in name else "top_k"

  def route(logits):
    if policy == "random":
      give(monkeypatch, "uniform", g["uniform"])
    if policy == "sampling":
      give(monkeypatch, "gumbel", -np.log(-np.log(g["uniform"])))
    return run(router, logits, opts, valid, key=None if policy == "all" else KEY)

  routing = route(g.groups("logits", 3))
  g.same("dispatch_mask", mask(routing))
  g.near("combine", combine(routing))
  if valid is None:
    g.near("aux_loss", balance(routing, first=True), 1e-5)
  elif not legacy:
    g.near("aux_loss", balance(routing, valid, first=True), 1e-5)
  else:
    # Legacy divides both means by T, padding included.
    share = jnp.mean(valid, axis=-1)
    counts = jax.vmap(losses.first_choices)(routing, valid)
    each = jax.vmap(losses.balance_loss)(routing.probs, counts, valid)
    g.near("aux_loss", jnp.mean(each * jnp.square(share)), 1e-5)
  if valid is None:
    check_gradients(g, route, first=True)


@pytest.mark.parametrize("name", names("axlearn_top"))
def test_axlearn(name: str):
  """Gates over their sum before drops; sigmoid scores normalised over all experts."""
  g = Golden(name)
  opts = options_of(g, renormalize="before_drop")
  router = "sigmoid_bias" if "sigmoid" in name else "top_k"

  def route(logits):
    return run(router, logits, opts)

  first = "top2" in name
  routing = route(g.groups("logits", 3))
  g.same("dispatch_mask", mask(routing))
  g.near("combine", combine(routing))
  g.near("aux_loss", balance(routing, first=first), 1e-5)
  g.near("z_loss", z(g.groups("logits", 3)), 1e-5)
  check_gradients(g, route, first)


@pytest.mark.parametrize("name", names("axlearn_bias", "axlearn_dropfree"))
def test_axlearn_dropless(name: str):
  """DeepSeek-V3 gating: bias and groups in the choice alone; the bias's update."""
  g = Golden(name)
  p = g.params
  sigmoid = p.get("score") != "softmax"
  opts = options_of(
    g,
    renormalize="before_drop",
    gate_scale=p.get("routed_scaling_factor", 1.0),
    num_expert_groups=p.get("num_groups", 1),
    num_selected_groups=p.get("topk_group", 1),
    group_best=2,
  )
  extra = {"bias": jnp.asarray(g["bias"])} if "bias" in g else {}
  logits = jnp.asarray(g["logits"])
  routing = run("sigmoid_bias" if sigmoid else "top_k", logits, opts, **extra)
  g.same("indices", routing.assignments.expert)
  g.near("weights", routing.assignments.gate)
  g.near("seq_aux_loss", balance(routing), 1e-5)
  g.near("z_loss", z(logits), 1e-5)
  pooled = losses.balance_loss(
    routing.probs.reshape(-1, p["E"]),
    jnp.sum(routing.stats.chosen, 0),
    jnp.ones(p["G"] * p["T"], bool),
  )
  g.near("aux_loss", pooled, 1e-5)
  if "bias" in g:
    chosen = jnp.sum(routing.stats.chosen, 0)
    new = losses.updated_bias(jnp.asarray(g["bias"]), chosen, p["update_rate"])
    g.near("new_bias", new)
