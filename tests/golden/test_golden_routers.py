"""Our routers against what other codebases' routers put out, recorded.

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
from moejax.routing.base import RouterOptions
from tests.golden.common import (
  Golden,
  balance,
  combine,
  cotangent,
  mask,
  names,
  options_of,
  run,
  z,
)

KEY = jax.random.key(0)


def give(monkeypatch, function: str, values) -> None:
  """Replaces jax.random.`function` by recorded draws, one group after the other."""
  state = {"next": 0}

  def draw(*args, **kwargs):
    state["next"] += 1
    return jnp.asarray(values[(state["next"] - 1) % len(values)])

  monkeypatch.setattr(f"jax.random.{function}", draw)


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
    gate = routing.gate.reshape(p["G"], p["T"], p["K"])
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
      jnp.stack([everything.expert.reshape(shape), everything.slot.reshape(shape)], -1),
    )
  else:
    g.same("dispatch_mask", mask(routing))
  d_x, d_w = jax.grad(loss, (0, 1))(x, w)
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
  g.near("grad_w_aux", jax.grad(aux)(w), 1e-5)


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
  d_x, d_w = jax.grad(loss, (0, 1))(x, w)
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
  g.same("indices", jnp.stack([everything.expert[0], everything.slot[0]], -1))
  g.near("index_weights", everything.gate)
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

  g.near("grad_w_aux", jax.grad(total)(w), 1e-5)


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
  g.same("indices", routing.expert)
  g.same("locations", routing.slot)
  g.near("gates", routing.gate)
  g.near("aux_loss", balance(routing, first=True), 1e-5)
  capped = run("top_k", logits, options_of(g, priority=priority))
  np.testing.assert_array_equal(capped.kept, routing.slot < g.params["C"])


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


def _gradients(g: Golden, route, first: bool, valid=None) -> None:
  logits = g.groups("logits", 3)

  def combined(logits):
    out = combine(route(logits))[..., : g.params["C"]]
    return jnp.sum(out * cotangent(out.shape))

  def aux(logits):
    return balance(route(logits), valid, first=first)

  g.near("grad_logits_combine", jax.grad(combined)(logits), 1e-5)
  if "grad_logits_aux" in g:
    g.near("grad_logits_aux", jax.grad(aux)(logits), 1e-5)


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
  _gradients(g, route, first)


@pytest.mark.parametrize("name", names("praxis_top"))
def test_praxis(name: str, monkeypatch):
  """Legacy renormalises before drops, otherwise after; only first choices counted."""
  g = Golden(name)
  policy = g.params.get("second_expert_policy", "all")
  legacy = g.params.get("legacy_mtf_behavior", True)
  if policy == "random" and not legacy:
    pytest.skip("compares the raw second gate with the draw: docs/conventions.md")
  renormalize = "before_drop" if legacy else "after_drop"
  opts = options_of(
    g,
    renormalize="none" if g.params["K"] == 1 else renormalize,
    second_policy={"sampling": "sample"}.get(policy, policy),
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
    _gradients(g, route, first=True)


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
  _gradients(g, route, first)


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
  g.same("indices", routing.expert)
  g.near("weights", routing.gate)
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

  dropless = RouterOptions(**{**_fields(opts), "capacity": None})
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
  g.near("grad_logits_aux", jax.grad(aux)(logits), 1e-5)
  g.near("grad_logits_z", jax.grad(z)(logits), 1e-5)
  g.near("grad_logits_probs", jax.grad(loss)(logits), 1e-5)


def _fields(options: RouterOptions) -> dict:
  return {f: getattr(options, f) for f in options.__dataclass_fields__}


@pytest.mark.parametrize("name", names("megatron_sinkhorn"))
def test_megatron_sinkhorn(name: str):
  """The same transport plan."""
  g = Golden(name)
  cost = jnp.asarray(g["cost"])
  plan = sinkhorn(cost, jnp.ones(len(cost), bool), tolerance=1e-4, max_iterations=1000)
  g.near("plan", plan, 1e-5)


@pytest.mark.parametrize("name", names("megablocks"))
def test_megablocks(name: str):
  """Raw or L1-normalised gates; losses per layer."""
  g = Golden(name)
  norm = g.params["moe_normalize_expert_weights"]
  opts = options_of(g, renormalize="before_drop" if norm == 1 else "none")
  logits = jnp.einsum("ltd,led->lte", g["x"], g["router_weight"])
  routing = run("top_k", logits, opts)
  g.near("scores", routing.probs)
  g.same("indices", routing.expert)
  g.near("aux_loss", balance(routing), 1e-5)
  g.near("z_loss", [z(one[None]) for one in logits], 1e-5)
  if norm != 2:
    g.near("weights", routing.gate)


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
  g.near("grad_logits", jax.grad(pooled)(logits), 1e-5)
  if "loss_of_each_layer" in g:
    g.near("loss_of_each_layer", [pooled(one[None]) for one in logits], 1e-5)
